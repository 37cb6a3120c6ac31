"""The convolution that expands its packed weights, and its input gradient, against float64."""

import pytest
import torch
from conv_oracle import MASKS, SHAPES, layer, within_tf32
from kernel_oracle import close
from lth_sparse.kernels.conv_bitmap import forward, input_gradient
from lth_sparse.kernels.geometry import geometry


def forward_of(case, bias=None, **options):
    return forward(case.x, case.values, case.bits, bias, case.geometry, **options)


def gradient_of(case, **options):
    return input_gradient(case.dy, case.values, case.bits, case.geometry, tuple(case.x.shape), **options)


def assert_right(case):
    wanted, theirs = case.gradients(), case.gradients(torch.float32)
    y, dx = forward_of(case), gradient_of(case)
    assert y.dtype == case.x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert dx.dtype == case.x.dtype and dx.is_contiguous(memory_format=torch.channels_last)
    assert close(y, wanted[0], theirs[0])
    assert close(dx, wanted[1], theirs[1])


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle(name):
    assert_right(layer(name))


@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind):
    assert_right(layer("1x3 stride 2, 1", kind))


@pytest.mark.parametrize("relu", [False, True])
def test_bias_and_relu_end_the_forward(relu):
    case = layer("1x3 stride 2, 1")
    wanted, theirs = (case.gradients(d)[0] + case.bias.to(d)[:, None, None] for d in (torch.float64, torch.float32))
    y = forward_of(case, case.bias.repeat(2).view(2, -1).t().contiguous()[:, 0], relu=relu)
    assert (wanted < 0).any()
    assert close(y, *(t.relu() if relu else t for t in (wanted, theirs)))


def test_relu_lets_what_is_not_a_number_through():
    case = layer("grey 5x5", "all")
    case.x[0, 0, 4, 4] = float("nan")
    assert forward_of(case, relu=True)[0, :, 4, 4].isnan().all()


def test_a_group_does_not_meet_the_weights_of_the_next():
    case = layer("groups", "all")
    case.weight[4:] = float("nan")
    y, dx = forward_of(case), gradient_of(case)
    assert y[:, :4].isfinite().all() and dx[:, :33].isfinite().all() and not dx[:, 33:].isfinite().any()


@pytest.mark.parametrize("name", ["1x3 stride 2, 1", "grey 5x5"])
def test_takes_any_strides(name):
    for case in layer(name).in_other_strides():
        assert_right(case)


def test_no_images_give_none():
    case = layer("3x3")
    empty = case._replace(x=case.x[:0], dy=case.dy[:0])
    assert forward_of(empty).shape == (0, 70, 7, 9) and gradient_of(empty).shape == (0, 64, 7, 9)


def test_same_inputs_same_bits():
    case = layer("first layer, strided")
    assert torch.equal(forward_of(case), forward_of(case)) and torch.equal(gradient_of(case), gradient_of(case))


@pytest.mark.gpu  # the interpreter's bf16 dot is wrong (Triton 3.6 and 3.9)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name, sizes", [("3x3", (64, 64, 96, 32, 32)), ("first layer, strided", (33, 32, 40, 31, 31))])
@pytest.mark.parametrize("same", [False, True])
def test_low_precisions_err_no_more_than_torch(name, sizes, dtype, same):
    case = layer(name, dtype=dtype, sizes=sizes)
    values = case.values.to(dtype) if same else case.values
    y = forward(case.x, values, case.bits, None, case.geometry)
    dx = input_gradient(case.dy, values, case.bits, case.geometry, tuple(case.x.shape))
    wanted, theirs = case.gradients(), case.gradients(dtype, "cuda")
    assert y.dtype == dx.dtype == dtype
    assert close(y, wanted[0], theirs[0]) and close(dx, wanted[1], theirs[1])


@pytest.mark.parametrize(
    "name, sizes", [("1x3 stride 2, 1", None), pytest.param("3x3", (64, 64, 96, 32, 32), marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_cut_operands_stay_within_their_cut(name, sizes, precision):
    case = layer(name, sizes=sizes)
    wanted = case.gradients()
    sums = case._replace(x=case.x.abs(), dy=case.dy.abs(), weight=case.weight.abs()).gradients()
    assert within_tf32(forward_of(case, precision=precision), wanted[0], sums[0])
    assert within_tf32(gradient_of(case, precision=precision), wanted[1], sums[1])


@pytest.mark.gpu
def test_three_tf32_products_are_nearly_float32():
    case = layer("3x3", sizes=(64, 64, 96, 32, 32))
    y, dx, _ = case.gradients()
    assert (forward_of(case, precision="tf32x3") - y).abs().max() <= 1e-5 * y.abs().max()
    assert (gradient_of(case, precision="tf32x3") - dx).abs().max() <= 1e-5 * dx.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: {"x": c.x[:, :32]}, r"an input \(2, 32, 7, 9\) must be \[B, Cin, H, W\] for masks of 630 rows"),
        (lambda c: {"geometry": geometry(2, 1, 1)}, "630 rows"),
        (lambda c: {"x": c.x.double()}, "images must have one dtype of .* got x torch.float64"),
        (lambda c: {"x": c.x.to("meta")}, "images must be on the device of the masks.* x on meta"),
        (lambda c: {"weight": c.weight.half()}, r"values must be \[nnz\], float32 or float32, .* torch.float16"),
    ],
)
def test_what_does_not_fit_forward_is_named(change, message):
    case = layer("3x3")
    with pytest.raises(ValueError, match=message):
        forward_of(case._replace(**change(case)))


def test_wrong_bias_and_output_are_named():
    case = layer("3x3")
    with pytest.raises(ValueError, match=r"bias must be \[70\] on .*, got \(64,\)"):
        forward_of(case, case.bias[:64])
    with pytest.raises(ValueError, match=r"an output for inputs \(2, 64, 7, 9\) must be \(2, 70, 7, 9\), got"):
        gradient_of(case._replace(dy=case.dy[:, :, 1:]))
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, got 'fp8'"):
        gradient_of(case, precision="fp8")
