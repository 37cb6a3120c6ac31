"""Weight gradient of a linear layer at kept positions only: a GEMM over the batch whose store is packed, or masked.

dW[n, k] = sum_b dY[b, n] X[b, k]. Every tile is computed densely on the tensor cores; its epilogue looks each position
up in the mask's bitmap and writes kept ones alone, so no dense gradient reaches memory; for the masked state it writes
the dense gradient with its zeros, once. Source: compute dense, store sparse, after the load-as-sparse tiles of
Flash-LLM (Xia et al. 2023) and SpInfer (Fan et al. 2025), run backwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import check_precision
from .pattern import Bitmap
from .places import places

# 64 x 64 tiles keep the sums and their places in registers without a spill at 8 warps.
ROWS = COLUMNS = 64
BATCH = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # of the batch per step: 128 bytes a row


@triton.jit
def _weight_gradient_kernel(
    dy, x, words, offsets, masks, gradient, bias_gradient,
    batch, n_rows, n_columns, n_words, nnz,
    dy_ticket, dy_batch, dy_row, x_ticket, x_batch, x_column,
    PACKED: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, EVEN_BATCH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    ticket = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dy += ticket * dy_ticket
    x += ticket * x_ticket
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    bias = tl.zeros((ROWS,), tl.float32)
    for start in range(0, batch, BATCH):
        b = start + tl.arange(0, BATCH)
        dy_inside, x_inside = (row < n_rows)[:, None], (column < n_columns)[None, :]
        if not EVEN_BATCH:
            dy_inside, x_inside = dy_inside & (b < batch)[None, :], x_inside & (b < batch)[:, None]
        dy_at = row[:, None].to(tl.int64) * dy_row + b[None, :] * dy_batch  # [ROWS, BATCH]
        x_at = b[:, None] * x_batch + column[None, :].to(tl.int64) * x_column  # [BATCH, COLUMNS]
        dy_tile = tl.load(dy + dy_at, mask=dy_inside, other=0.0)
        x_tile = tl.load(x + x_at, mask=x_inside, other=0.0)
        sums = tl.dot(dy_tile, x_tile, sums, input_precision=PRECISION)
        if HAS_BIAS:
            bias += tl.sum(dy_tile.to(tl.float32), 1)
    if PACKED:
        first = ticket * n_rows * n_words
        kept, at = places(words + first, offsets + first, row, tl.program_id(1) * COLUMNS, n_rows, n_words, COLUMNS)
        tl.store(gradient + ticket * nnz + at, sums, mask=kept)
    else:
        inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
        at = ticket * n_rows * n_columns + row[:, None].to(tl.int64) * n_columns + column[None, :]
        kept = tl.load(masks + at, mask=inside, other=0) != 0
        tl.store(gradient + at, tl.where(kept, sums, 0.0), mask=inside)
    if HAS_BIAS and tl.program_id(1) == 0:
        tl.store(bias_gradient + ticket * n_rows + row, bias, mask=row < n_rows)


def weight_gradient(
    dy: Tensor, x: Tensor, bitmap: Bitmap, nnz: int, bias: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the packed values, and of the bias, of R linear layers y = x W^T + b at once.

    Args:
        dy: output gradient [R, B, N], float32, bfloat16 or float16, any strides.
        x: input [R, B, K] of the same dtype and device; R may be a stride-0 expansion.
        bitmap: the masks [R, N, K], on that device.
        nnz: kept weights of each mask.
        precision: of the float32 product: "ieee", "tf32" or "tf32x3"; sums are float32 always.

    Returns:
        gradient float32 [R, nnz] in row-major order of the masks, and float32 [R, N] or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    shape = dy.shape[0], dy.shape[-1], x.shape[-1]
    _check(dy, x, tuple(bitmap.words.shape), (*shape[:2], -(-shape[2] // 32)), bitmap.words.device, precision)
    gradient = torch.empty(shape[0], nnz, dtype=torch.float32, device=dy.device)
    return gradient, _launch(dy, x, *bitmap, None, gradient, nnz, bias, precision)


def masked_weight_gradient(
    dy: Tensor, x: Tensor, masks: Tensor, bias: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    """The same for the masked state: gradient float32 [R, N, K], zero off the bool `masks` [R, N, K]."""
    _check(dy, x, tuple(masks.shape), (dy.shape[0], dy.shape[-1], x.shape[-1]), masks.device, precision)
    gradient = torch.empty(masks.shape, dtype=torch.float32, device=dy.device)
    masks = masks.contiguous().view(torch.uint8)
    return gradient, _launch(dy, x, None, None, masks, gradient, 0, bias, precision)


def _launch(dy, x, words, offsets, masks, gradient, nnz, bias, precision):
    tickets, n_rows, n_columns = dy.shape[0], dy.shape[2], x.shape[2]
    chunk = BATCH[dy.dtype]
    # tf32 wants the batch contiguous: row-major operands compile to 48 copies of 4 bytes, these to 12 of 16.
    even = precision == "tf32" and dy.dtype == torch.float32
    if even:
        dy, x = _batch_last(dy, chunk), _batch_last(x, chunk)
    bias_gradient = torch.empty(tickets, n_rows, dtype=torch.float32, device=dy.device) if bias else None
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS), tickets)
    _weight_gradient_kernel[grid](
        dy, x, words, offsets, masks, gradient, bias_gradient,
        dy.shape[1], n_rows, n_columns, triton.cdiv(n_columns, 32), nnz,
        dy.stride(0), dy.stride(1), dy.stride(2), x.stride(0), x.stride(1), x.stride(2),
        PACKED=masks is None, HAS_BIAS=bias, PRECISION=precision, EVEN_BATCH=even,
        ROWS=ROWS, COLUMNS=COLUMNS, BATCH=chunk, num_warps=8,
    )  # fmt: skip
    return bias_gradient


def _batch_last(tensor: Tensor, multiple: int) -> Tensor:
    """The same [R, B', C], batch contiguous in memory and padded with zeros to a multiple."""
    pad = -tensor.shape[1] % multiple
    return torch.nn.functional.pad(tensor.transpose(1, 2), (0, pad)).contiguous().transpose(1, 2)


def _check(dy, x, masks_shape, wanted, device, precision):
    if not (dy.dim() == x.dim() == 3 and dy.shape[:2] == x.shape[:2] and masks_shape == wanted):
        raise ValueError(
            f"dy {tuple(dy.shape)} and x {tuple(x.shape)} must be [R, B, N] and [R, B, K] for masks {masks_shape} of "
            "R, N and K or its words"
        )
    if dy.dtype != x.dtype or dy.dtype not in BATCH or not dy.device == x.device == device:
        raise ValueError(
            f"dy and x must have one dtype of {', '.join(str(d)[6:] for d in BATCH)} on the device of the masks, got "
            f"{dy.dtype} on {dy.device}, {x.dtype} on {x.device}, masks on {device}"
        )
    check_precision(precision)
