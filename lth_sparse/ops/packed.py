"""The operator of packed layers and its gradients, by any strategy: pure functions of the values and the pattern."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.pattern import Bitmap
from .conv import CONV2D, output_shape
from .linear import LINEAR
from .strategy import Strategy, define, kernels

STRATEGIES: dict[str, dict[str, Strategy]] = {"linear": LINEAR, "conv2d": CONV2D}


def packed(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    shadow: Tensor | None,
    pattern: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    kind: str,
    strategy: str,
) -> Tensor:
    """A Linear or convolution of R tickets given by their kept weights alone; differentiable once, in the first three.

    Computed in the dtype of x; sums are float32 or wider.

    Args:
        x: "linear" [R, B, K]; "conv2d" [B, Cin, H, W], where R is 1.
        values: kept weights [R, nnz], row-major in masks [R, N, K], or [1, Cout, kh, kw, Cin / groups]. Given as
            [nnz], there is no dimension R here nor in x, bias and y.
        bias: [R, N] or [1, Cout], or None.
        shadow: the live part of the dense weights, in the shape of the masks, for strategies that have one.
        pattern: `STRATEGIES[kind][strategy].structures(masks, sizes)`.
        sizes: "linear" (N,); "conv2d" `conv_sizes(layer)`.

    Returns:
        y [R, B, N], or [B, Cout, OH, OW], in the dtype of x.
    """
    y = _Packed.apply(x, values, bias, shadow, sizes, kind, strategy, *pattern)
    return y.squeeze(0) if values.dim() == 1 and kind == "linear" else y


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, values, bias, shadow, sizes, kind, strategy, *pattern):
        ctx.how, ctx.single = (sizes, kind, strategy), values.dim() == 1
        if ctx.single:
            values, bias = values[None], None if bias is None else bias[None]
            x = x[None] if kind == "linear" else x
        x = STRATEGIES[kind][strategy].arranged(x)
        ctx.save_for_backward(x, values, shadow, *pattern)
        return _forward(x, values, bias, shadow, pattern, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, values, shadow, *pattern = ctx.saved_tensors
        wants_x, wants_values, wants_bias, *_ = ctx.needs_input_grad
        wants = wants_x, wants_values or wants_bias
        dx, dvalues, dbias = _backward(dy, x, values, shadow, pattern, *ctx.how, *wants)
        if ctx.single and wants[1]:
            dvalues, dbias = dvalues[0], dbias[0]
        dx = dx[0] if wants_x and ctx.single and ctx.how[1] == "linear" else dx
        gradients = dx if wants_x else None, dvalues if wants_values else None, dbias if wants_bias else None
        return *gradients, None, None, None, None, *(None for _ in pattern)


def _run_forward(x, values, bias, shadow, pattern, sizes, kind, strategy):
    # data: no view, as autograd lets no later layer work in place (ReLU) on a view that a Function has made
    return STRATEGIES[kind][strategy].forward(x, values, bias, shadow, pattern, sizes).data


def _fake_forward(x, values, bias, shadow, pattern, sizes, kind, strategy):
    shape = (*x.shape[:2], sizes[0]) if kind == "linear" else output_shape(x.shape, sizes)
    return STRATEGIES[kind][strategy].empty(x, shape)


@torch.autocast("cpu", enabled=False)
@torch.autocast("cuda", enabled=False)
def _run_backward(dy, x, values, shadow, pattern, sizes, kind, strategy, wants_x, wants_values):
    how = STRATEGIES[kind][strategy]
    # once for both products: CSR ones at 4096 x 4096, density 0.1 and batch 60 take 24 ms instead of 27 (two threads)
    dy = how.arranged(dy.to(x.dtype))
    dx = how.input_gradient(dy, values, shadow, pattern, sizes, x.shape) if wants_x else x.new_empty(0)
    if not wants_values:
        return dx, values.new_empty(0), values.new_empty(0)
    dvalues, dbias = how.weight_gradient(dy, x, values, pattern, sizes)
    return dx, dvalues.to(values.dtype), dbias.to(values.dtype)


def _fake_backward(dy, x, values, shadow, pattern, sizes, kind, strategy, wants_x, wants_values):
    dx = STRATEGIES[kind][strategy].empty(x, x.shape) if wants_x else x.new_empty(0)
    if not wants_values:
        return dx, values.new_empty(0), values.new_empty(0)
    return dx, torch.empty_like(values), values.new_empty(len(values), sizes[0])


_forward = define(
    "packed(Tensor x, Tensor values, Tensor? bias, Tensor? shadow, Tensor[] pattern, int[] sizes, str kind,"
    " str strategy) -> Tensor",
    _run_forward,
    _fake_forward,
)
_backward = define(
    "packed_backward(Tensor dy, Tensor x, Tensor values, Tensor? shadow, Tensor[] pattern, int[] sizes, str kind,"
    " str strategy, bool wants_x, bool wants_values) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


def _run_refresh(shadow, values, words, offsets):
    matrix = shadow.view(len(shadow), words.shape[1], -1)
    kernels("shadow").refresh_(matrix, values.view(len(shadow), -1), Bitmap(words, offsets))


_refresh = define(
    "refresh_(Tensor(a!) shadow, Tensor values, Tensor words, Tensor offsets) -> ()",
    _run_refresh,
    lambda shadow, values, words, offsets: None,
)


def refresh_(shadow: Tensor, values: Tensor, pattern: tuple[Tensor, ...]) -> None:
    """Write the packed `values` [R, nnz] or [nnz], and zeros between them, to the `shadow` of such a pattern."""
    _refresh(shadow, values, *pattern[-2:])
