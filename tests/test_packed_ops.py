"""The packed operator by every strategy: float64's numbers for R tickets, well formed, and clear about bad input."""

import pytest
import torch
import torch.nn.functional as F
from kernel_oracle import DEVICE, MASKS, close, make_masks, random

from lth_sparse import ops

LINEAR, CONV2D = ops.STRATEGIES["linear"], ops.STRATEGIES["conv2d"]
RUNNABLE = [name for name in LINEAR if name != "cpu" or DEVICE == "cpu"]
CONV_SIZES = {  # Cout; kernel, stride, padding, dilation; groups; then Cin and the size of the images
    "3x3": ((5, 3, 3, 1, 1, 1, 1, 1, 1, 1), 4, (6, 7)),
    "strided": ((6, 3, 2, 2, 1, 0, 1, 1, 2, 2), 4, (7, 9)),
    "1x1": ((3, 1, 1, 2, 2, 0, 0, 1, 1, 1), 33, (5, 5)),
}


def operands(kind, strategy, masks, sizes, x_shape, dtype=torch.float32):
    how = ops.STRATEGIES[kind][strategy]
    values = random(len(masks), int(masks[0].sum()), dtype=dtype, seed=2)
    live = how.live(masks)
    shadow = None if live is None else values.new_zeros(live.shape).masked_scatter(live, values)
    bias = random(len(masks), sizes[0], dtype=dtype, seed=3)
    leaves = [tensor.requires_grad_() for tensor in (random(*x_shape, dtype=dtype), values, bias)]
    return leaves, (shadow, how.structures(masks, sizes), sizes, kind, strategy)


def run(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = function(*leaves)
    dy = random(*y.shape, seed=4).to(y.dtype)
    y.backward(dy)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(ours, reference, leaves):
    theirs = run(reference, leaves)
    wanted = run(reference, [leaf.double() for leaf in leaves])
    for got, right, other in zip(ours, wanted, theirs, strict=True):
        assert got.dtype == other.dtype and close(got, right, other)


@pytest.mark.parametrize("strategy", RUNNABLE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("tickets, batch, n, k", [(1, 60, 33, 70), (3, 5, 8, 40), (1, 1, 17, 33)])
def test_linear(strategy, kind, tickets, batch, n, k):
    if strategy == "shrink" and tickets > 1:
        pytest.skip("of one ticket: each has rows and columns of its own that live")
    masks = make_masks(kind, tickets, n, k)
    leaves, rest = operands("linear", strategy, masks, (n,), (tickets, batch, k))

    def reference(x, values, bias):
        weights = values.new_zeros(masks.shape).masked_scatter(masks, values)
        return x @ weights.mT + bias[:, None]

    assert_close(run(lambda *t: ops.packed(*t, *rest), leaves), reference, leaves)


@pytest.mark.parametrize("strategy", CONV2D)
@pytest.mark.parametrize("kind", ["random", "none", "one", "empty channels"])
@pytest.mark.parametrize("name", CONV_SIZES)
def test_conv2d(strategy, kind, name):
    sizes, channels, size = CONV_SIZES[name]
    if strategy == "shrink" and sizes[-1] > 1:
        pytest.skip("of one group: each has input channels of its own that live")
    masks = random(1, sizes[0], *sizes[1:3], channels // sizes[-1]) > (9 if kind in ("none", "one") else 0.5)
    if kind == "one":
        masks[0, 1, 0, -1, 1] = True
    elif kind == "empty channels":
        masks[:, 1], masks[..., 0] = False, False
    leaves, rest = operands("conv2d", strategy, masks, sizes, (3, channels, *size))

    def reference(x, values, bias):
        rows = values.new_zeros(masks.shape).masked_scatter(masks, values)
        return F.conv2d(x, rows[0].permute(0, 3, 1, 2), bias[0], **ops.conv_options(sizes))

    assert_close(run(lambda *t: ops.packed(*t, *rest), leaves), reference, leaves)


@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_derivatives_of_the_cpu_strategy_agree_with_float64_differences(density):
    masks = random(2, 7, 9).cpu().abs() < 10 * density
    masks[:, :, :] = torch.rand(7, 9) < density
    leaves, rest = operands("linear", "cpu", masks, (7,), (2, 5, 9), torch.float64)
    assert torch.autograd.gradcheck(lambda *t: ops.packed(*t, *rest), leaves)


@pytest.mark.parametrize("kind, strategy", [(kind, name) for kind, table in ops.STRATEGIES.items() for name in table])
def test_operators_are_well_formed(kind, strategy):
    if strategy not in RUNNABLE:
        pytest.skip("runs on the CPU alone")
    if kind == "linear":
        masks, sizes, shape, out = make_masks("random", 1, 7, 9), (7,), (1, 5, 9), (1, 5, 7)
    else:
        sizes, shape, out = CONV_SIZES["3x3"][0], (2, 4, 6, 7), (2, 5, 6, 7)
        masks = make_masks("random", 1, 45, 4).view(1, 5, 3, 3, 4)
    leaves, (shadow, pattern, *how) = operands(kind, strategy, masks, sizes, shape)
    x, values, bias = (leaf.detach() for leaf in leaves)
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.lth_sparse.packed.default
    torch.library.opcheck(forward, (x, values, bias, shadow, list(pattern), *how), test_utils=tests)
    backward, dy = torch.ops.lth_sparse.packed_backward.default, random(*out)
    for wants in ((True, True), (False, True), (True, False)):
        arguments = (dy, x, values, shadow, list(pattern), *how, *wants)
        torch.library.opcheck(backward, arguments, test_utils=tests)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("strategy", ["dense", "shrink"])
def test_refresh_writes_values_and_zeros(kind, strategy):
    masks = make_masks("empty row and column", 1, 45, 4)
    masks = masks if kind == "linear" else masks.view(1, 5, 3, 3, 4)
    sizes = (45,) if kind == "linear" else CONV_SIZES["3x3"][0]
    how = ops.STRATEGIES[kind][strategy]
    live, values = how.live(masks), random(int(masks.sum()))
    shadow = torch.full(live.shape, float("nan"), device=DEVICE)
    ops.refresh_(shadow, values, how.structures(masks, sizes))
    assert torch.equal(shadow, torch.zeros_like(shadow).masked_scatter(live, values))


@pytest.mark.parametrize(
    "x, message",
    [
        (torch.zeros(3, 8), r"shape \(any, 9\), torch.float32 on cpu, got \(3, 8\), torch.float32 on cpu"),
        (torch.zeros(9), r"got \(9,\)"),
        (torch.zeros(3, 9).double(), "got .* torch.float64"),
        (torch.zeros(3, 9, device="meta"), "on meta"),
    ],
)
def test_an_input_that_does_not_fit_is_named(x, message):
    with pytest.raises(ValueError, match=message):
        ops.check_input(x, torch.zeros(4), (None, 9))
