"""The packed weight gradient against float64; on a GPU also in the precisions that the interpreter gets wrong."""

import pytest
import torch
from kernel_oracle import DEVICE, MASKS, close, make_masks, packed, random
from lth_sparse.kernels.pattern import bitmap
from lth_sparse.kernels.weight_gradient import masked_weight_gradient, weight_gradient


def operands(tickets, batch, n, k, dtype=torch.float32):
    return random(tickets, batch, n, dtype=dtype), random(tickets, batch, k, dtype=dtype, seed=1)


def count(masks):
    return int(masks[0].sum())


def oracle(dy, x, masks):
    dense = dy.double().transpose(1, 2) @ x.double()
    return packed(dense, masks), dy.double().sum(1)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 60, 70, 100), (2, 33, 65, 130), (1, 1, 1, 1), (3, 257, 17, 33), (1, 5, 64, 64)])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_equals_the_oracle_at_kept_positions(kind, shape, precision):
    if precision == "tf32" and DEVICE == "cuda":
        pytest.skip("rounds to 10 bits there: see the precisions on a GPU")  # the interpreter does not round
    masks, (dy, x) = make_masks(kind, shape[0], *shape[2:]), operands(*shape)
    gradient, bias = weight_gradient(dy, x, bitmap(masks), count(masks), precision=precision)
    wanted, wanted_bias = oracle(dy, x, masks)
    theirs = packed(dy.transpose(1, 2) @ x, masks)
    assert gradient.dtype == torch.float32 and gradient.shape == wanted.shape
    assert close(gradient, wanted, theirs) and close(bias, wanted_bias, dy.sum(1))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", [(1, 60, 70, 100), (3, 5, 17, 33)])
def test_the_masked_store_writes_zeros_too(kind, shape):
    masks, (dy, x) = make_masks(kind, shape[0], *shape[2:]), operands(*shape)
    gradient, bias = masked_weight_gradient(dy, x, masks)
    wanted, wanted_bias = oracle(dy, x, masks)
    theirs = dy.transpose(1, 2) @ x
    assert close(packed(gradient, masks), wanted, packed(theirs, masks)) and close(bias, wanted_bias, dy.sum(1))
    assert gradient.shape == masks.shape and (gradient[~masks] == 0).all()


def test_takes_any_strides_and_one_input_for_all_tickets():
    masks, (dy, x) = make_masks("random", 3, 40, 50), operands(3, 20, 40, 50)
    shared = x[:1].expand(3, -1, -1)
    batch_last = dy.transpose(1, 2).contiguous().transpose(1, 2)
    gradient, _ = weight_gradient(batch_last, shared, bitmap(masks), count(masks), bias=False)
    wanted, _ = oracle(dy, shared, masks)
    assert close(gradient, wanted, packed(dy.transpose(1, 2) @ shared, masks))


def test_bias_gradient_is_left_out_on_request():
    masks, (dy, x) = make_masks("random", 1, 8, 8), operands(1, 4, 8, 8)
    assert weight_gradient(dy, x, bitmap(masks), count(masks), bias=False)[1] is None


def test_same_inputs_same_bits():
    masks, (dy, x) = make_masks("random", 1, 70, 90), operands(1, 60, 70, 90)
    runs = [weight_gradient(dy, x, bitmap(masks), count(masks))[0] for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.gpu  # the interpreter's bf16 dot is wrong, and its tf32 does not round (Triton 3.6 and 3.9)
@pytest.mark.parametrize("dtype, precision", [("bfloat16", "ieee"), ("float16", "ieee"), ("float32", "tf32")])
def test_low_precisions_err_no_more_than_torch(dtype, precision):
    masks, (dy, x) = make_masks("random", 1, 300, 784), operands(1, 257, 300, 784, getattr(torch, dtype))
    gradient, _ = weight_gradient(dy, x, bitmap(masks), count(masks), precision=precision)
    torch.set_float32_matmul_precision("high")
    theirs = packed(dy.transpose(1, 2) @ x, masks)
    torch.set_float32_matmul_precision("highest")
    assert close(gradient, oracle(dy, x, masks)[0], theirs)


@pytest.mark.gpu
def test_three_tf32_products_are_nearly_float32():
    masks, (dy, x) = make_masks("random", 1, 300, 784), operands(1, 257, 300, 784)
    gradient, _ = weight_gradient(dy, x, bitmap(masks), count(masks), precision="tf32x3")
    wanted = oracle(dy, x, masks)[0]
    assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda dy, x: (dy[:, :, :5], x), r"dy \(1, 4, 5\) and x \(1, 4, 40\) must be"),
        (lambda dy, x: (dy, x[:, :3]), r"dy \(1, 4, 8\) and x \(1, 3, 40\) must be"),
        (lambda dy, x: (dy, x[:, :, :20]), r"masks \(1, 8, 2\)"),
        (lambda dy, x: (dy[0], x[0]), "must be"),
        (lambda dy, x: (dy.double(), x.double()), "one dtype of float32, bfloat16, float16.*got torch.float64"),
        (lambda dy, x: (dy, x.bfloat16()), "torch.bfloat16"),
        (lambda dy, x: (dy, x.to("meta")), "on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    masks, (dy, x) = make_masks("random", 1, 8, 40), operands(1, 4, 8, 40)
    with pytest.raises(ValueError, match=message):
        weight_gradient(*change(dy, x), bitmap(masks), count(masks))


def test_unknown_precision_is_named():
    masks, (dy, x) = make_masks("random", 1, 8, 8), operands(1, 4, 8, 8)
    with pytest.raises(ValueError, match="precision must be one of ieee, tf32, tf32x3, got 'fp8'"):
        weight_gradient(dy, x, bitmap(masks), count(masks), precision="fp8")


def test_masks_of_another_shape_are_named():
    masks, (dy, x) = make_masks("random", 1, 8, 40), operands(1, 4, 8, 39)
    with pytest.raises(ValueError, match=r"x \(1, 4, 39\) must be .* for masks \(1, 8, 40\)"):
        masked_weight_gradient(dy, x, masks)
