"""The packed weight gradient of a convolution against float64, and how it is split."""

import pytest
import torch
from conv_oracle import DEVICE, MASKS, SHAPES, layer, packed, within_tf32
from kernel_oracle import close
from lth_sparse.kernels import conv_weight_gradient as module
from lth_sparse.kernels.conv_weight_gradient import weight_gradient
from lth_sparse.kernels.geometry import conv_rows, geometry


def run(case, **options):
    return weight_gradient(case.dy, case.x, case.bits, int(case.mask.sum()), case.geometry, **options)


def assert_right(case, **options):
    gradient, bias = run(case, **options)
    wanted, theirs = (packed(case.gradients(dtype)[2], case.mask) for dtype in (torch.float64, torch.float32))
    assert gradient.dtype == bias.dtype == torch.float32
    assert close(gradient, wanted, theirs)
    assert close(bias, case.dy.double().sum((0, 2, 3)), case.dy.float().sum((0, 2, 3)))


@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_oracle_at_kept_positions(name):
    assert_right(layer(name))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", ["groups", "first layer, strided"])
def test_every_mask(name, kind):
    assert_right(layer(name, kind))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_partial_sums_add_up_and_the_last_may_be_short(parts, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", parts)
    monkeypatch.setattr(module, "LEAST", 1)
    case = layer("first layer, strided")  # 180 positions: parts of 192, 96 and 64, the last of 52
    assert module._split(180, 1, 32) == {1: (1, 192), 2: (2, 96), 5: (3, 64)}[parts]
    assert_right(case)


def test_split_fills_the_gpu_without_splintering():
    assert module._split(128 * 32 * 32, 5, 64) == (53, 2496)  # 64 to 64 channels, 3x3: 265 programs
    assert module._split(128 * 4 * 4, 144, 64) == (2, 1024)
    assert module._split(300, 5, 64) == (1, 320)  # fewer than twice 512 positions are not worth a second part
    assert module._split(0, 5, 64) == (1, 64)


@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
def test_rounded_operands_stay_within_their_rounding(precision):
    case = layer("3x3")
    size = case._replace(x=case.x.abs(), dy=case.dy.abs()).gradients()[2]
    gradient, _ = run(case, precision=precision)
    assert within_tf32(gradient, packed(case.gradients()[2], case.mask), packed(size, case.mask))


def test_rounding_keeps_what_is_not_a_number():
    case = layer("grey 5x5", "all")
    case.dy[0, 3, 2, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    gradient, _ = run(case, precision="tf32")
    assert gradient.view(8, 25)[3].isnan().all() and not gradient.view(8, 25)[4].isnan().any()


@pytest.mark.parametrize("name", ["first layer, strided", "grey 5x5"])
def test_takes_any_strides(name):
    for case in layer(name).in_other_strides():
        assert_right(case)


def test_no_images_give_zeros():
    case = layer("3x3")
    gradient, bias = run(case._replace(x=case.x[:0], dy=case.dy[:0]))
    assert torch.equal(gradient, torch.zeros(int(case.mask.sum()), device=DEVICE)) and not bias.any()


def test_bias_gradient_is_left_out_on_request():
    assert run(layer("depthwise"), bias=False)[1] is None


def test_same_inputs_same_bits():
    case = layer("first layer, strided")
    assert torch.equal(run(case)[0], run(case)[0])


@pytest.mark.gpu  # the interpreter's bf16 dot is wrong, and its tf32 does not round (Triton 3.6 and 3.9)
@pytest.mark.parametrize("dtype, precision", [("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32")])
@pytest.mark.parametrize("name, sizes", [("3x3", (32, 64, 128, 32, 32)), ("first layer, strided", (33, 3, 64, 31, 31))])
def test_low_precisions_err_no_more_than_torch(name, sizes, dtype, precision):
    dtype = getattr(torch, dtype)
    case = layer(name, dtype=dtype, sizes=sizes)
    torch.backends.cudnn.allow_tf32 = True  # torch's default, for float32
    theirs = packed(case.gradients(dtype, "cuda")[2].float(), case.mask)
    assert close(run(case, precision=precision)[0], packed(case.gradients()[2], case.mask), theirs)


@pytest.mark.gpu
def test_three_tf32_products_are_nearly_float32():
    case = layer("3x3", sizes=(32, 64, 128, 32, 32))
    gradient, wanted = run(case, precision="tf32x3")[0], packed(case.gradients()[2], case.mask)
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: {"dy": c.dy[:, :, :5]}, r"an output for inputs \(2, 64, 7, 9\) must be \(2, 70, 7, 9\), got"),
        (lambda c: {"dy": c.dy[:1]}, r"must be \(2, 70, 7, 9\), got \(1, 70, 7, 9\)"),
        (lambda c: {"x": c.x[:, :32]}, r"an input \(2, 32, 7, 9\) must be \[B, Cin, H, W\] for masks of 630 rows"),
        (lambda c: {"x": c.x[0]}, r"an input \(64, 7, 9\) must be"),
        (lambda c: {"geometry": geometry(2, 1, 1)}, "630 rows"),
        (
            lambda c: {"x": c.x.double(), "dy": c.dy.double()},
            "one dtype of float32, bfloat16, float16, got dy torch.fl",
        ),
        (lambda c: {"x": c.x.bfloat16()}, "got dy torch.float32, x torch.bfloat16"),
        (lambda c: {"x": c.x.to("meta")}, "on the device of the masks"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = layer("3x3")
    with pytest.raises(ValueError, match=message):
        run(case._replace(**change(case)))


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, got 'fp8'"):
        run(layer("depthwise"), precision="fp8")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"kernel_size": 0}, "kernel_size must be an int or a pair of ints from 1 on, got 0"),
        ({"kernel_size": 3, "padding": "same"}, "padding must be an int or a pair of ints from 0 on, got 'same'"),
        ({"kernel_size": 3, "stride": (1, 2, 3)}, r"stride must be .* got \(1, 2, 3\)"),
        ({"kernel_size": 3, "groups": 0}, "groups must be at least 1, got 0"),
    ],
)
def test_wrong_geometry_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        geometry(**arguments)


def test_window_larger_than_its_input_is_named():
    with pytest.raises(ValueError, match=r"a window of \(5, 3\) does not fit into a padded input of \(4, 9\)"):
        geometry((3, 3), dilation=(2, 1), padding=(0, 1)).output_size((4, 7))


def test_rows_of_a_mask_are_taps_of_outputs():
    mask = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    assert conv_rows(mask).shape == (1, 8, 3)
    assert conv_rows(mask)[0, 4 + 3].tolist() == mask[1, :, 1, 1].tolist()
