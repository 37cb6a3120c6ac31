"""2-D convolution and its input gradient straight from the packed weights: implicit GEMMs that expand them.

A program owns a tile of pixels and channels. Step by step it reads the pixels under one tap, expands that tap's
weights from bitmap and packed values in registers, and multiplies the two densely on the tensor cores: neither dense
weight nor unfolded input reaches memory. Expanding costs a program the same for few pixels as for many, so the tile
is long in pixels. Source: load as sparse, compute as dense, of Flash-LLM (Xia et al. 2023) and SpInfer (Fan et al.
2025), in the implicit GEMM of cuDNN (Chetlur et al. 2014).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry
from .pattern import Bitmap
from .places import places
from .windows import channels_last, check, window, within

PROGRAMS = 132  # one for each multiprocessor of an H200


@triton.jit
def _weights(
    values, words, offsets, group, row, tap, first_column, n_rows, n_words, G: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The weights [row, column] of a tap, zeros between the kept ones and beyond the rows of the group."""
    total = n_rows * G.groups * G.taps
    at = tl.where(row < n_rows, (group * n_rows + row) * G.taps + tap, total)
    kept, place = places(words, offsets, at, first_column, total, n_words, COLUMNS)
    return tl.load(values + place, mask=kept, other=0.0)


@triton.jit
def _forward_kernel(
    x, values, words, offsets, bias, y,
    positions, n_rows, n_channels, n_words,
    SIZE: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    row = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    position = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image, top, left = window(position, OUT, G)
    x_channels, y_channels = n_channels * G.groups, n_rows * G.groups
    corner = ((image.to(tl.int64) * SIZE[0] + top) * SIZE[1] + left) * x_channels
    x += group * n_channels
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for step in range(0, G.taps * tl.cdiv(n_channels, DEPTH)):
        tap, first = step % G.taps, step // G.taps * DEPTH
        down, right = tap // G.kernel[1] * G.dilation[0], tap % G.kernel[1] * G.dilation[1]
        channel = first + tl.arange(0, DEPTH)
        read = within(top + down, left + right, SIZE) & (position < positions)
        x_at = corner[:, None] + ((down * SIZE[1] + right) * x_channels + channel)[None, :]
        x_tile = tl.load(x + x_at, mask=read[:, None] & (channel < n_channels)[None, :], other=0.0)
        weights = _weights(values, words, offsets, group, row, tap, first, n_rows, n_words, G, DEPTH)
        sums = tl.dot(x_tile, tl.trans(weights.to(x_tile.dtype)), sums, input_precision=PRECISION)
    known = row < n_rows
    row += group * n_rows
    if bias is not None:
        sums += tl.load(bias + row, mask=known, other=0.0).to(tl.float32)[None, :]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # NaN stays
    y_at = position.to(tl.int64)[:, None] * y_channels + row[None, :]
    tl.store(y + y_at, sums.to(y.dtype.element_ty), mask=(position < positions)[:, None] & known[None, :])


@triton.jit
def _phase(
    phase, SIZE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr, STRIDE: tl.constexpr, KERNEL: tl.constexpr
):  # fmt: skip
    """Along one axis, how many input pixels are `phase` modulo the stride, and the first and number of taps on them."""
    first, taps = KERNEL, 0
    for back in tl.static_range(KERNEL):
        tap = KERNEL - 1 - back
        hits = (phase + PADDING - tap * DILATION) % STRIDE == 0
        first = tl.where(hits, tap, first)
        taps += hits.to(tl.int32)
    return (SIZE - phase + STRIDE - 1) // STRIDE, first, taps


@triton.jit
def _input_gradient_kernel(
    dy, values, words, offsets, dx,
    images, n_rows, n_channels, n_words,
    SIZE: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # The pixels of a program are one phase, so that the same taps reach all of them: no tap is tried in vain.
    PHASES: tl.constexpr = G.stride[0] * G.stride[1]
    group, phase = tl.program_id(2) // PHASES, tl.program_id(2) % PHASES
    down, right = phase // G.stride[1], phase % G.stride[1]
    high, first_down, taps_down = _phase(down, SIZE[0], G.padding[0], G.dilation[0], G.stride[0], G.kernel[0])
    wide, first_right, taps_right = _phase(right, SIZE[1], G.padding[1], G.dilation[1], G.stride[1], G.kernel[1])
    position = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    known_pixel = position < images * high * wide
    # A phase may have no pixel, and a pixel no tap; no division may be by zero, which the compiler takes as a promise.
    image, pixel = position // tl.maximum(high * wide, 1), position % tl.maximum(high * wide, 1)
    down += pixel // tl.maximum(wide, 1) * G.stride[0]
    right += pixel % tl.maximum(wide, 1) * G.stride[1]
    bottom = (down + G.padding[0] - first_down * G.dilation[0]) // G.stride[0]
    end = (right + G.padding[1] - first_right * G.dilation[1]) // G.stride[1]
    x_channels, dy_channels = n_channels * G.groups, n_rows * G.groups
    corner = ((image.to(tl.int64) * OUT[0] + bottom) * OUT[1] + end) * dy_channels
    dy += group * n_rows
    sums = tl.zeros((PIXELS, CHANNELS), tl.float32)
    taps = tl.maximum(taps_down * taps_right, 1)
    for step in range(0, taps_down * taps_right * tl.cdiv(n_rows, DEPTH)):
        at, row = step % taps, step // taps * DEPTH + tl.arange(0, DEPTH)
        at_down, at_right = at // tl.maximum(taps_right, 1), at % tl.maximum(taps_right, 1)
        tap = (first_down + at_down * G.apart[0]) * G.kernel[1] + first_right + at_right * G.apart[1]
        up = at_down * (G.apart[0] * G.dilation[0] // G.stride[0])
        back = at_right * (G.apart[1] * G.dilation[1] // G.stride[1])
        read = within(bottom - up, end - back, OUT) & known_pixel
        dy_at = corner[:, None] + (row - (up * OUT[1] + back) * dy_channels)[None, :]
        dy_tile = tl.load(dy + dy_at, mask=read[:, None] & (row < n_rows)[None, :], other=0.0)
        first = tl.program_id(1) * CHANNELS
        weights = _weights(values, words, offsets, group, row, tap, first, n_rows, n_words, G, CHANNELS)
        sums = tl.dot(dy_tile, weights.to(dy_tile.dtype), sums, input_precision=PRECISION)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    dx_at = ((image.to(tl.int64) * SIZE[0] + down) * SIZE[1] + right) * x_channels + group * n_channels
    known = known_pixel[:, None] & (channel < n_channels)[None, :]
    tl.store(dx + dx_at[:, None] + channel[None, :], sums.to(dx.dtype.element_ty), mask=known)


def forward(
    x: Tensor, values: Tensor, bitmap: Bitmap, bias: Tensor | None, geometry: Geometry,
    relu: bool = False, precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Convolve images with packed weights, add the bias, and clip at zero if `relu`.

    Args:
        x: input [B, Cin, H, W], float32, bfloat16 or float16, any strides: what is not channels_last is copied.
        values: kept weights [nnz] in the order of `conv_rows(mask)`, float32 or of x's dtype. float32 also suits the
            low precisions: the values are copied ahead of their use 4 bytes at a time, which 2 bytes cannot be.
        bitmap: of `conv_rows(mask)`, on the device of x.
        bias: [Cout] or None.
        geometry: of the convolution.
        precision: of the float32 product: "ieee", "tf32" or "tf32x3"; sums are float32 always.

    Returns:
        y [B, Cout, OH, OW] of x's dtype, channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    shape = check(geometry, bitmap, x.shape, None, precision, x=x)
    _check_weights(x, values, bias, shape[1])
    groups, n_rows, n_channels = geometry.groups, shape[1] // geometry.groups, x.shape[1] // geometry.groups
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    positions, channels = y[:, 0].numel(), _width(n_rows)
    tiles = triton.cdiv(n_rows, channels) * groups
    pixels = _pixels(positions, tiles, x.dtype, precision)
    bias = bias.contiguous() if bias is not None else None
    if positions:
        _forward_kernel[(triton.cdiv(positions, pixels), triton.cdiv(n_rows, channels), groups)](
            channels_last(x), values.contiguous(), bitmap.words, bitmap.offsets, bias, y,
            positions, n_rows, n_channels, bitmap.words.shape[2],
            SIZE=tuple(x.shape[2:]), OUT=shape[2:], G=geometry, RELU=relu, PRECISION=precision,
            PIXELS=pixels, CHANNELS=channels, DEPTH=_depth(n_channels, x.dtype), num_warps=8,
        )  # fmt: skip
    return y


def input_gradient(
    dy: Tensor, values: Tensor, bitmap: Bitmap, geometry: Geometry, input_shape: tuple[int, ...],
    precision: str = "ieee",
) -> Tensor:  # fmt: skip
    """Gradient of the input of a convolution with packed weights.

    Args:
        dy: output gradient [B, Cout, OH, OW], float32, bfloat16 or float16, any strides: what is not channels_last is
            copied.
        input_shape: of the input, (B, Cin, H, W).
        values, bitmap, geometry, precision: as for `forward`.

    Returns:
        dx [B, Cin, H, W] of dy's dtype, channels_last.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    check(geometry, bitmap, tuple(input_shape), dy.shape, precision, dy=dy)
    _check_weights(dy, values, None, dy.shape[1])
    images, n_rows, n_channels = dy.shape[0], dy.shape[1] // geometry.groups, input_shape[1] // geometry.groups
    dx = torch.empty(tuple(input_shape), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    phases, channels = geometry.stride[0] * geometry.stride[1], _width(n_channels)
    largest = images * triton.cdiv(dx.shape[2], geometry.stride[0]) * triton.cdiv(dx.shape[3], geometry.stride[1])
    tiles = (triton.cdiv(n_channels, channels), geometry.groups * phases)
    pixels = _pixels(largest, tiles[0] * tiles[1], dy.dtype, precision)
    # At a depth of 32 Triton 3.6 spills 16 bytes for sm_90 in "ieee".
    depth = 16 if (dy.dtype, precision) == (torch.float32, "ieee") else _depth(n_rows, dy.dtype)
    if images:
        _input_gradient_kernel[(triton.cdiv(largest, pixels), *tiles)](
            channels_last(dy), values.contiguous(), bitmap.words, bitmap.offsets, dx,
            images, n_rows, n_channels, bitmap.words.shape[2],
            SIZE=tuple(dx.shape[2:]), OUT=tuple(dy.shape[2:]), G=geometry, PRECISION=precision,
            PIXELS=pixels, CHANNELS=channels, DEPTH=depth, num_warps=8,
        )  # fmt: skip
    return dx


def _width(channels: int) -> int:
    """Channels of a tile: a whole number of bitmap words."""
    return 32 if channels <= 32 else 64


def _depth(channels: int, dtype: torch.dtype) -> int:
    """Channels summed per step: 128 bytes of a pixel, if it has that many."""
    return 32 if channels <= 32 or dtype == torch.float32 else 64


def _pixels(positions: int, tiles: int, dtype: torch.dtype, precision: str) -> int:
    """Pixels of a tile: 256 share one expansion of the weights, where that leaves programs for the whole GPU.

    float32 products in "ieee" and "tf32x3" would spill.
    """
    full = triton.cdiv(positions, 256) * tiles >= PROGRAMS
    return 256 if full and (dtype != torch.float32 or precision == "tf32") else 128


def _check_weights(image: Tensor, values: Tensor, bias: Tensor | None, n_outputs: int) -> None:
    if values.dim() != 1 or values.dtype not in (torch.float32, image.dtype) or values.device != image.device:
        raise ValueError(
            f"values must be [nnz], float32 or {str(image.dtype)[6:]}, on {image.device}, got {tuple(values.shape)} "
            f"{values.dtype} on {values.device}"
        )
    if bias is not None and (bias.shape != (n_outputs,) or bias.device != image.device):
        raise ValueError(f"bias must be [{n_outputs}] on {image.device}, got {tuple(bias.shape)} on {bias.device}")
