"""A linear layer and its input gradient from packed values: loaded sparse, multiplied dense.

Tiles of the weight are expanded in registers from bitmap and packed values and multiplied on the tensor cores, so
memory moves 32 d + 2 bits a weight at density d and no dense weight exists. One row-major format serves both
directions, as a tile expanded along its rows may be used transposed. Source: Flash-LLM (Xia et al. 2023) and SpInfer
(Fan et al. 2025), without their reordered formats.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import DTYPES, NAMES, beside, check_precision
from .pattern import Bitmap
from .places import expanded, fours

# Tiles of 128 outputs: every program reads the x of its steps, 16 MB in all for 4096 x 4096, batch 60 and bfloat16;
# 64 outputs would double that. Tiles of up to 64 of the batch: 128 need more than the 128 registers a thread with
# which two programs of 8 warps fit into an SM, and one alone waits for memory most of the time.
OUT, BATCH, WARPS = 128, 64, 8
# 64 deep, a thread expands 32 weights a step, in 12 to 16 instructions each on sm_90. Multiplied in full float32 or in
# three passes, a step of 64 spills (6048 bytes on sm_80); it is bound by arithmetic then, and 32 do.
STEP, SHORT_STEP = 64, 32
# A layer of fewer tiles is split along the sum until almost two programs run on each of an H200's 132 SMs; but none
# gets fewer steps than these: at 90% sparsity its partial sums cost three times the bytes of the weights it reads.
PROGRAMS, FEWEST_STEPS = 256, 4
BLOCK = 512  # outputs of a program that adds up partial sums: 16 bytes a thread


@triton.jit
def _bitmap_linear_kernel(
    x, values, words, offsets, bias, gate, out,
    batch, depth, width, n_rows, n_words, nnz, steps, x_ticket, x_batch,
    TRANSPOSED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    OUT: tl.constexpr, STEP: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    ticket = tl.program_id(2).to(tl.int64)
    n_batches = tl.cdiv(batch, BATCH)
    split = tl.program_id(1) // n_batches
    first, start = tl.program_id(0) * OUT, split * steps * STEP
    first_b = tl.program_id(1) % n_batches * BATCH
    b, left = tl.arange(0, BATCH), batch - first_b
    x += ticket * x_ticket + first_b.to(tl.int64) * x_batch
    values += ticket * nnz
    words += ticket * n_rows * n_words
    offsets += ticket * n_rows * n_words
    if TRANSPOSED:
        row, column = start + tl.arange(0, STEP), first
    else:
        row, column = first + tl.arange(0, OUT), start
    COLUMNS: tl.constexpr = OUT if TRANSPOSED else STEP
    sums = tl.zeros((OUT, BATCH), tl.float32)
    word, offset = fours(words, offsets, row, column, n_rows, n_words, COLUMNS)
    for deep in range(start, tl.minimum(start + steps * STEP, depth), STEP):
        k = deep + tl.arange(0, STEP)
        inside = (k < depth)[:, None] & (b < left)[None, :]
        x_tile = tl.load(x + (b[None, :] * x_batch + k[:, None]), mask=inside, other=0.0)
        if TRANSPOSED:
            row += STEP
        else:
            column += STEP
        # The next words are on their way while this tile waits for its values: one trip to memory a step, not two.
        next_word, next_offset = fours(words, offsets, row, column, n_rows, n_words, COLUMNS)
        tile = expanded(values, word, offset).to(x.dtype.element_ty)
        word, offset = next_word, next_offset
        sums = tl.dot(tl.trans(tile) if TRANSPOSED else tile, x_tile, sums, input_precision=PRECISION)
    width = width // ALIGNED * ALIGNED  # which it is: so the compiler knows that rows are whole vectors
    o = first + tl.arange(0, OUT)
    if bias is not None:
        sums += tl.load(bias + ticket * width + o, mask=o < width, other=0.0).to(tl.float32)[:, None]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out += ((split * tl.num_programs(2) + ticket) * batch + first_b) * width
    at = b[None, :] * width + o[:, None]
    inside = (o < width)[:, None] & (b < left)[None, :]
    sums = sums.to(out.dtype.element_ty)
    if gate is not None:  # then the sum is not split
        gate += (ticket * batch + first_b) * width
        sums = tl.where(tl.load(gate + at, mask=inside, other=0.0) <= 0, 0.0, sums)
    tl.store(out + at, sums, mask=inside)


@triton.jit
def _add_up_kernel(
    partial, bias, gate, y, n_lines, batch, width, RELU: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        sums += tl.load(partial + (split * n_lines + line) * width + o, mask=o < width, other=0.0)
    if bias is not None:
        sums += tl.load(bias + line // batch * width + o, mask=o < width, other=0.0).to(tl.float32)
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if gate is not None:
        sums = tl.where(tl.load(gate + line * width + o, mask=o < width, other=0.0) <= 0, 0.0, sums)
    tl.store(y + line * width + o, sums.to(y.dtype.element_ty), mask=o < width)


def forward(
    x: Tensor, values: Tensor, bitmap: Bitmap, bias: Tensor | None, relu: bool = False, precision: str = "ieee"
) -> Tensor:
    """y = x W^T + bias of R linear layers at once, then ReLU if asked for.

    Args:
        x: input [R, B, K], float32, bfloat16 or float16, any strides; R may be a stride-0 expansion.
        values: kept weights [R, nnz] in row-major order of the masks, contiguous, float32 or of the dtype of x, to
            which they are rounded.
        bitmap: the masks [R, N, K], N and K below 2**25.
        bias: [R, N], float32 or of the dtype of x, or None.
        precision: of the float32 product: "ieee", "tf32" or "tf32x3"; sums are float32 always.

    Returns:
        y [R, B, N] in the dtype of x. Deterministic; the order of the sums follows from the shapes alone.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check("x", x, values, bitmap, x.shape[-1], x.shape[-1], precision)
    bias = beside("bias", bias, tuple(bitmap.words.shape[:2]), x)
    return _product(x, values, bitmap, x.shape[2], bias, None, relu, precision, transposed=False)


def input_gradient(
    dy: Tensor, values: Tensor, bitmap: Bitmap, n_columns: int, precision: str = "ieee", gate: Tensor | None = None
) -> Tensor:
    """dx = dy W of R linear layers at once, from the operands of `forward`, and zero where `gate` is not positive.

    Args:
        dy: output gradient [R, B, N], float32, bfloat16 or float16, any strides.
        values, bitmap, precision, n_columns: as in `forward`; n_columns is K.
        gate: output [R, B, K] of the ReLU that made x, float32 or of the dtype of dy, or None.

    Returns:
        dx [R, B, K] in the dtype of dy, deterministic.

    Raises:
        ValueError: as `forward`.
    """
    _check("dy", dy, values, bitmap, bitmap.words.shape[1], n_columns, precision)
    gate = beside("gate", gate, (*dy.shape[:2], n_columns), dy)
    return _product(dy, values, bitmap, n_columns, None, gate, False, precision, transposed=True)


def _product(x, values, bitmap, n_columns, bias, gate, relu, precision, transposed):
    tickets, n_rows, n_words = bitmap.words.shape
    batch, width = x.shape[1], n_columns if transposed else n_rows
    y = torch.empty(tickets, batch, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = _vectors(x)
    tile = min(max(triton.next_power_of_2(batch), 16), BATCH)
    tf32 = x.dtype == torch.float32 and precision == "tf32"
    step = STEP if tf32 or x.dtype != torch.float32 else SHORT_STEP
    tiles = triton.cdiv(width, OUT), triton.cdiv(batch, tile)
    splits, steps = _splits(tiles[0] * tiles[1] * tickets, triton.cdiv(x.shape[2], step))
    sums = y if splits == 1 else y.new_empty(splits, tickets, batch, width, dtype=torch.float32)
    _bitmap_linear_kernel[tiles[0], tiles[1] * splits, tickets](
        x, values, bitmap.words, bitmap.offsets,
        bias if splits == 1 else None, gate if splits == 1 else None, sums,
        batch, x.shape[2], width, n_rows, n_words, values.shape[1], steps, x.stride(0), x.stride(1),
        TRANSPOSED=transposed, RELU=relu and splits == 1, PRECISION=precision,
        ALIGNED=math.gcd(width, 16 // x.element_size()), OUT=OUT, STEP=step, BATCH=tile,
        # One stage: the pipeliner would copy each value on its own, in 18 instructions a weight. tf32 takes up to 160
        # registers unless told; bfloat16 keeps to about 128 on sm_90 by itself, and would spill on sm_80 if told.
        num_warps=WARPS, num_stages=1, maxnreg=128 if tf32 else None,
    )  # fmt: skip
    if splits > 1:
        _add_up_kernel[tickets * batch, triton.cdiv(width, BLOCK)](
            sums, bias, gate, y, tickets * batch, batch, width, RELU=relu, SPLITS=splits, BLOCK=BLOCK, num_warps=4
        )
    return y


def _vectors(x):
    """x, or a zero-padded copy, in rows read 16 bytes at a time (contiguous for tf32), a tile of them within 2**31."""
    fits = x.stride(2) == 1 and x.stride(1) % 16 == 0 and x.stride(1) < 2**25 and x.shape[2] % 16 == 0
    return x if fits else torch.nn.functional.pad(x, (0, -x.shape[2] % 16)).contiguous()


def _splits(tiles: int, steps: int) -> tuple[int, int]:
    """How many programs share the sum of a tile, none of them idle, and the steps of each."""
    each = max(triton.cdiv(steps, max(PROGRAMS // tiles, 1)), min(steps, FEWEST_STEPS), 1)
    return max(triton.cdiv(steps, each), 1), each


def _check(name, x, values, bitmap, depth, n_columns, precision):
    tickets, n_rows, n_words = bitmap.words.shape
    if x.dim() != 3 or x.shape[0] != tickets or x.shape[2] != depth or -(-n_columns // 32) != n_words:
        raise ValueError(
            f"{name} {tuple(x.shape)} and K {n_columns} do not fit masks of R {tickets}, N {n_rows} and {n_words} "
            f"words of columns: wanted [R, B, {'K' if name == 'x' else 'N'}]"
        )
    if values.dim() != 2 or values.shape[0] != tickets or not values.is_contiguous():
        raise ValueError(f"values must be contiguous [R, nnz] of R {tickets}, got {tuple(values.shape)}")
    if x.dtype not in DTYPES or values.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"{name} must be of {NAMES} and values of float32 or the same, got {x.dtype} and {values.dtype}"
        )
    if not x.device == values.device == bitmap.words.device:
        raise ValueError(
            f"{name}, values and masks must be on one device, got {x.device}, {values.device} and {bitmap.words.device}"
        )
    check_precision(precision)
