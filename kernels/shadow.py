"""The shadow: the dense weight with zeros, written from the packed values for strategies that multiply densely."""

import triton
import triton.language as tl
from torch import Tensor

from .pattern import Bitmap
from .places import places

ROWS, COLUMNS = 32, 128  # a thread of 4 warps then holds 32 entries, and stores 16 bytes at a time


@triton.jit
def _refresh_kernel(
    values, words, offsets, shadow, n_rows, n_columns, n_words, nnz,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ticket = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    words += ticket * n_rows * n_words
    offsets += ticket * n_rows * n_words
    kept, at = places(words, offsets, row, tl.program_id(1) * COLUMNS, n_rows, n_words, COLUMNS)
    value = tl.load(values + ticket * nnz + at, mask=kept, other=0.0)
    inside = (row < n_rows)[:, None] & (column < n_columns)[None, :]
    out = shadow + ticket * n_rows * n_columns + row[:, None].to(tl.int64) * n_columns + column[None, :]
    tl.store(out, value.to(shadow.dtype.element_ty), mask=inside)


def refresh_(shadow: Tensor, values: Tensor, bitmap: Bitmap) -> None:
    """Write `values` [R, nnz], and zeros between them, to the contiguous `shadow` [R, N, K], in its dtype."""
    tickets, n_rows, n_columns = shadow.shape
    grid = (triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, COLUMNS), tickets)
    _refresh_kernel[grid](
        values, bitmap.words, bitmap.offsets, shadow, n_rows, n_columns, bitmap.words.shape[2], values.shape[1],
        ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
