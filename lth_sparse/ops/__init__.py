"""Operators with a mask in them; the only module that imports the kernels."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.pattern import Bitmap, Csr, bitmap, csr, pack_bits, unpack_bits
from .masked import apply_mask, mask_gradient, masked_linear

__all__ = [
    "Bitmap",
    "Csr",
    "apply_mask",
    "bitmap",
    "csr",
    "csr_linear",
    "mask_gradient",
    "masked_linear",
    "pack_bits",
    "refresh_",
    "shadow_linear",
    "unpack_bits",
]

with warnings.catch_warnings():  # torch warns once that CSR is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0))


@torch.library.custom_op("lth_sparse::csr_linear", mutates_args=())
def csr_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    row_starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    order: Tensor,
) -> Tensor:
    """y [B, N] = x [B, K] W^T + bias [N], W [N, K] given by its kept `values` [nnz] and a `Csr` pattern.

    Differentiable in x, values and bias. On the CPU MKL does all three products; batch-last strides come out, which
    the next layer takes without a copy.
    """
    weight = _sparse(row_starts, columns, values, x.shape[1])
    y = torch.mm(weight, x.t()) if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return y.t()


@csr_linear.register_fake
def _(x, values, bias, row_starts, columns, column_starts, rows, order):
    return x.new_empty(row_starts.shape[0] - 1, x.shape[0]).t()


@torch.library.custom_op("lth_sparse::csr_linear_backward", mutates_args=())
def csr_linear_backward(
    dy: Tensor,
    x: Tensor,
    values: Tensor,
    row_starts: Tensor,
    columns: Tensor,
    column_starts: Tensor,
    rows: Tensor,
    order: Tensor,
    input_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients dX [B, K] (empty unless wanted) and dvalues [nnz] of `csr_linear`, for dY [B, N]."""
    dx = x.new_empty(0)
    if input_gradient:
        # index_select with int32: 3 ms for 1.7 million values, 13 ms as values[order] (one core, torch 2.15)
        transposed = _sparse(column_starts, rows, values.index_select(0, order), dy.shape[1])
        dx = torch.mm(transposed, dy.t()).t()
    pattern = _sparse(row_starts, columns, torch.zeros_like(values), x.shape[1])
    # a CSR tensor's own autograd would return this gradient dense
    return dx, torch.sparse.sampled_addmm(pattern, dy.t(), x, beta=0.0).values()


@csr_linear_backward.register_fake
def _(dy, x, values, row_starts, columns, column_starts, rows, order, input_gradient):
    dx = x.new_empty(x.shape[1], x.shape[0]).t() if input_gradient else x.new_empty(0)
    return dx, torch.empty_like(values)


def _save_for_backward(ctx, inputs, output):
    x, values, bias, *pattern = inputs
    ctx.save_for_backward(x, values, *pattern)


def _csr_linear_backward(ctx, dy):
    x, values, *pattern = ctx.saved_tensors
    wants_x, _, wants_bias, *_ = ctx.needs_input_grad
    dx, dvalues = csr_linear_backward(dy, x, values, *pattern, wants_x)
    return dx if wants_x else None, dvalues, dy.sum(0) if wants_bias else None, None, None, None, None, None


csr_linear.register_autograd(_csr_linear_backward, setup_context=_save_for_backward)


def _sparse(starts, indices, values, width):
    shape = (len(starts) - 1, width)
    return torch.sparse_csr_tensor(starts, indices, values, shape, check_invariants=False)


@torch.library.custom_op("lth_sparse::refresh_", mutates_args=("shadow",))
def refresh_(shadow: Tensor, values: Tensor, words: Tensor, offsets: Tensor) -> None:
    """Write the packed `values` [nnz], and zeros between them, to `shadow` [N, K], for the `Bitmap` of a mask."""
    from ..kernels.shadow import refresh_ as launch  # Triton may be absent where nothing is packed this way

    launch(shadow[None], values[None], Bitmap(words, offsets))


@torch.library.custom_op("lth_sparse::shadow_linear", mutates_args=())
def shadow_linear(
    x: Tensor, values: Tensor, shadow: Tensor, bias: Tensor | None, words: Tensor, offsets: Tensor
) -> Tensor:
    """y [B, N] = x [B, K] shadow^T + bias, where `shadow` [N, K] holds `values` [nnz], whose gradient it gives.

    Differentiable in x, values and bias: dense products forward and for dX, and for the values a GEMM that stores
    kept positions alone. Precision is torch's: "highest" is float32 throughout, "high" tf32.
    """
    return F.linear(x, shadow, bias)


@shadow_linear.register_fake
def _(x, values, shadow, bias, words, offsets):
    return x.new_empty(x.shape[0], shadow.shape[0])


@torch.library.custom_op("lth_sparse::packed_weight_gradient", mutates_args=())
def packed_weight_gradient(
    dy: Tensor, x: Tensor, values: Tensor, words: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the packed values [nnz] and of the bias [N], for dY [B, N] and X [B, K]."""
    from ..kernels.weight_gradient import weight_gradient

    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    gradients = weight_gradient(dy[None], x[None], Bitmap(words, offsets), len(values), precision=precision)
    return gradients[0][0].to(values.dtype), gradients[1][0].to(values.dtype)


@packed_weight_gradient.register_fake
def _(dy, x, values, words, offsets):
    return torch.empty_like(values), values.new_empty(dy.shape[1])


def _save_shadow(ctx, inputs, output):
    x, values, shadow, _, words, offsets = inputs
    ctx.save_for_backward(x, values, shadow, words, offsets)


def _shadow_linear_backward(ctx, dy):
    x, values, shadow, words, offsets = ctx.saved_tensors
    wants_x, wants_values, _, wants_bias, *_ = ctx.needs_input_grad
    dvalues = dbias = None
    if wants_values or wants_bias:
        dvalues, dbias = packed_weight_gradient(dy.to(x.dtype), x, values, words, offsets)
    return dy @ shadow if wants_x else None, dvalues, None, dbias if wants_bias else None, None, None


shadow_linear.register_autograd(_shadow_linear_backward, setup_context=_save_shadow)
