"""Weight gradient of a 2-D convolution at kept positions only: an implicit GEMM whose store is packed.

dW[co, tap, ci] = sum_p dY[p, co] X[pixel of p and tap, ci] over output positions p of all images. Its columns are the
pairs (tap, ci), so narrow layers fill a tile with several taps. Positions are many and tiles few, so they are split
between programs, each of which stores its packed partial sums; a second pass adds those in a fixed order. No dense
gradient and no unfolded input reaches memory. Source: as `weight_gradient`; the unfolding without memory is that of
cuDNN (Chetlur et al. 2014).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry
from .pattern import Bitmap
from .places import popcount
from .windows import channels_last, check, window, within

COLUMNS = 128
POSITIONS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # summed per step
PROGRAMS = 264  # to fill the GPU: two for each of the 132 multiprocessors of an H200
LEAST = 512  # positions a program sums at least, so that its epilogue stays a small part of its work


@triton.jit
def _weight_gradient_kernel(
    dy, x, words, offsets, gradient,
    positions, part, n_rows, n_channels, n_words, nnz,
    SIZE: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(2) % G.groups, tl.program_id(2) // G.groups
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tap, channel = column // n_channels, column % n_channels
    down, right = tap // G.kernel[1] * G.dilation[0], tap % G.kernel[1] * G.dilation[1]
    known_row, known_column = row < n_rows, tap < G.taps
    dy_channels, x_channels = n_rows * G.groups, n_channels * G.groups
    dy_at = group * n_rows + row
    x_at = group * n_channels + channel + (down * SIZE[1] + right) * x_channels
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(split * part, tl.minimum((split + 1) * part, positions), POSITIONS):
        position = start + tl.arange(0, POSITIONS)
        image, top, left = window(position, OUT, G)
        corner = ((image.to(tl.int64) * SIZE[0] + top) * SIZE[1] + left) * x_channels
        read = within(top[:, None] + down[None, :], left[:, None] + right[None, :], SIZE)
        read = read & (position < positions)[:, None] & known_column[None, :]
        dy_read = known_row[:, None] & (position < positions)[None, :]
        dy_tile = tl.load(dy + (position.to(tl.int64) * dy_channels)[None, :] + dy_at[:, None], mask=dy_read, other=0.0)
        x_tile = tl.load(x + corner[:, None] + x_at[None, :], mask=read, other=0.0)
        if PRECISION == "tf32":
            dy_tile, x_tile = rounded(dy_tile), rounded(x_tile)
        sums = tl.dot(dy_tile, x_tile, sums, input_precision=PRECISION)
    gradient += split.to(tl.int64) * nnz
    # By halves, the places of 128 x 128 sums fit into registers beside them; at once Triton 3.6 spills 168 bytes.
    halves = tl.split(tl.permute(tl.reshape(sums, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        column = tl.program_id(1) * COLUMNS + half * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
        _store(halves[half], words, offsets, gradient, group, row, column, n_rows, n_channels, n_words, G)


@triton.jit
def _store(sums, words, offsets, gradient, group, row, column, n_rows, n_channels, n_words, G: tl.constexpr):
    """Store the sums of kept positions at their places in the packed gradient."""
    tap, channel = column // n_channels, column % n_channels
    at = ((group * n_rows + row) * G.taps)[:, None] + tap[None, :]
    at = at * n_words + (channel // 32)[None, :]
    known, bit = (row < n_rows)[:, None] & (tap < G.taps)[None, :], (channel % 32)[None, :]
    word = tl.load(words + at, mask=known, other=0)
    place = tl.load(offsets + at, mask=known, other=0) + popcount(word & ((1 << bit) - 1))
    tl.store(gradient + place, sums, mask=((word >> bit) & 1) == 1)


@triton.jit
def rounded(x):
    """float32 raised by half of the last bit of tf32: where the tensor cores cut off the rest, that rounds.

    It also brings the operand into registers, from where it is transposed: tensor cores of sm_90 take tf32 with
    positions contiguous only, and Triton else transposes by copies of 4 bytes.
    """
    bits = x.to(tl.int32, bitcast=True) + 0x1000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN would carry over into the sign


def weight_gradient(
    dy: Tensor, x: Tensor, bitmap: Bitmap, nnz: int, geometry: Geometry, bias: bool = True, precision: str = "ieee"
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the packed values, and of the bias, of a convolution.

    Positions are split into as many parts as make 264 programs of the gradient's tiles, two for each multiprocessor
    of an H200, but into none of fewer than 512 positions. The S * nnz partial sums then take less than those tiles
    and one more set of tiles would dense, 17 MB and one layer, times the density.

    Args:
        dy: output gradient [B, Cout, OH, OW], float32, bfloat16 or float16.
        x: input [B, Cin, H, W] of the same dtype and device. Both may have any strides: what is not channels_last
            is copied.
        bitmap: of `conv_rows(mask)`, on that device.
        nnz: kept weights of the mask.
        geometry: of the convolution.
        precision: of the float32 product: "ieee", "tf32" or "tf32x3"; sums are float32 always.

    Returns:
        gradient float32 [nnz] in the order of `conv_rows(mask)`, and float32 [Cout] or None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check(geometry, bitmap, x.shape, dy.shape, precision, dy=dy, x=x)
    groups, chunk = geometry.groups, POSITIONS[dy.dtype]
    positions, n_rows, n_channels = dy[:, 0].numel(), dy.shape[1] // groups, x.shape[1] // groups
    # 128 rows halve the reads of x; in "ieee" they spill 24 bytes for sm_80.
    rows = 128 if n_rows > 64 and (dy.dtype, precision) != (torch.float32, "ieee") else 64
    tiles = (triton.cdiv(n_rows, rows), triton.cdiv(geometry.taps * n_channels, COLUMNS))
    splits, part = _split(positions, tiles[0] * tiles[1] * groups, chunk)
    gradient = torch.empty(splits, nnz, dtype=torch.float32, device=dy.device)
    _weight_gradient_kernel[(*tiles, groups * splits)](
        channels_last(dy), channels_last(x), bitmap.words, bitmap.offsets, gradient,
        positions, part, n_rows, n_channels, bitmap.words.shape[2], nnz,
        SIZE=tuple(x.shape[2:]), OUT=tuple(dy.shape[2:]), G=geometry, PRECISION=precision,
        ROWS=rows, COLUMNS=COLUMNS, POSITIONS=chunk, num_warps=8,
    )  # fmt: skip
    # A pass of its own over dy: sums beside the product cost 40% more instructions in every one of its steps.
    bias_gradient = dy.sum((0, 2, 3), dtype=torch.float32) if bias else None
    return gradient[0] if splits == 1 else gradient.sum(0), bias_gradient


def _split(positions: int, tiles: int, chunk: int) -> tuple[int, int]:
    """Into how many parts positions are split, and how many each has, a multiple of `chunk`; no part is empty."""
    wanted = max(1, min(triton.cdiv(PROGRAMS, tiles), positions // LEAST))
    part = triton.cdiv(max(1, positions), wanted * chunk) * chunk
    return max(1, triton.cdiv(positions, part)), part
