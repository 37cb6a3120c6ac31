"""Direct sparse 2-D convolution on CUDA cores: each kept weight adds its value times a shifted plane, no tap more.

Source: Escort (Chen 2018) and SkimCaffe (Park et al. 2017); planes sorted by length as in Sputnik (Gale et al. 2020).
The images are first copied with their border of zeros, and as many of them side by side as fill 16 bytes: then every
shift, stride and dilation is one unmasked, aligned 16-byte load per thread, and lanes hold neighbouring pixels. In the
images as they come the same bytes are four 4-byte loads with their addresses and masks, since a shift by one column
breaks the alignment. The copy moves 2 elements for each that the taps read Cout * kh * kw * density times (17 times at
64 channels, 3x3 and 97%).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry
from .operands import DTYPES, NAMES
from .taps import Reads, Taps, furthest

BLOCK = 256  # pixels that a program of the copy writes
LANES = 32  # of a warp, each at a pixel of its own
# Planes and positions (pixels x images) of a program, the largest first: what 32 planes read once from L2 they read
# 32 * kh * kw * density times from L1 (8.6 at 3x3 and 97%), borders aside. The others are for layers of fewer programs.
SHAPES = ((32, 512), (16, 512), (16, 256), (8, 256), (8, 128), (4, 128))
PROGRAMS = 198  # one and a half for each of 132 multiprocessors
REGISTERS = 128  # all that 16 warps can have; left to itself ptxas spills to fit twice as many threads


@triton.jit
def _pixel(at, SIZE: tl.constexpr):
    """Number of the plane, row and column of each place in contiguous planes of SIZE."""
    inner = at % (SIZE[0] * SIZE[1])
    return at // (SIZE[0] * SIZE[1]), inner // SIZE[1], inner % SIZE[1]


@triton.jit
def _interleave_kernel(
    source, out,
    n_images, channels, height, width, top, left,
    source_image, source_channel, source_row, source_column,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = (tl.program_id(1) + tl.zeros((BLOCK,), tl.int64)) * IMAGES
    channel, row, column = _pixel(at, WINDOW)
    row, column = row + top, column + left
    inside = (channel < channels) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source += channel.to(tl.int64) * source_channel + row.to(tl.int64) * source_row + column * source_column
    lane = tl.arange(0, IMAGES)[None, :]
    tile = tl.zeros((BLOCK, IMAGES), source.dtype.element_ty)
    for image in tl.static_range(IMAGES):
        one = tl.load(source + (first + image) * source_image, mask=inside & (first + image < n_images), other=0.0)
        tile = tl.where(lane == image, one[:, None], tile)
    size = channels * (WINDOW[0] * WINDOW[1])
    tl.store(out + (first * size + at * IMAGES)[:, None] + lane, tile, mask=(at < size)[:, None])


@triton.jit
def _products(images, values, places, order, at, first, WINDOW: tl.constexpr, IMAGES: tl.constexpr):
    """A kept weight of each output plane times the pixels that it reads: [TILES, GROUP, LANES, IMAGES]."""
    value = tl.load(values + first + tl.load(order + at).to(tl.int32)).to(tl.float32)
    place = tl.load(places + at)
    shift = ((place >> 16) * WINDOW[0] + ((place >> 8) & 255)) * WINDOW[1] + (place & 255)
    x = tl.load(images + (shift * IMAGES)[None, :, None, None])
    return value[None, :, None, None] * x.to(tl.float32)


@triton.jit
def _direct_kernel(
    images, values, starts, places, order, by_length, bias, out,
    n_planes, n_pixels, n_images, channels, in_channels,
    WINDOW: tl.constexpr, STEPS: tl.constexpr, OUT: tl.constexpr, PHASES: tl.constexpr, PHASE: tl.constexpr,
    RELATIVE: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    TILES: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, IMAGES: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    # Tiles are [TILES, GROUP, LANES, IMAGES]: a warp holds whole planes, a lane pixels, a thread the images of a pixel.
    slot = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    plane = tl.load(by_length + tl.minimum(slot, n_planes - 1))
    start = tl.load(starts + plane)
    length = tl.load(starts + plane + 1) - start
    spot = (tl.program_id(0) * TILES + tl.arange(0, TILES))[:, None] * LANES + tl.arange(0, LANES)[None, :]
    block, row, column = _pixel(tl.minimum(spot, n_pixels - 1), PHASE)
    base = block.to(tl.int64) * in_channels * (WINDOW[0] * WINDOW[1]) + row * (STEPS[0] * WINDOW[1]) + column * STEPS[1]
    lane = tl.arange(0, IMAGES)[None, None, None, :]
    images += (base * IMAGES)[:, None, :, None] + lane
    sums = tl.zeros((TILES, GROUP, LANES, IMAGES), tl.float32)
    first_value = start if RELATIVE else tl.zeros_like(start)
    together = tl.min(length) // UNROLL * UNROLL
    for step in range(0, together, UNROLL):
        for ahead in tl.static_range(UNROLL):
            sums += _products(images, values, places, order, start + step + ahead, first_value, WINDOW, IMAGES)
    for step in range(together, tl.max(length)):
        live = step < length
        at = tl.where(live, start + step, 0)
        product = _products(images, values, places, order, at, tl.where(live, first_value, 0), WINDOW, IMAGES)
        sums += tl.where(live[None, :, None, None], product, 0.0)
    channel, phase = plane % channels, plane // channels
    if HAS_BIAS:
        sums += tl.load(bias + channel).to(tl.float32)[None, :, None, None]
    if RELU:
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    block, row, column = _pixel(spot, PHASE)  # anew: kept, they would hold 12 registers through the loops
    down = row[:, None, :] * PHASES[0] + (phase // PHASES[1])[None, :, None]
    right = column[:, None, :] * PHASES[1] + (phase % PHASES[1])[None, :, None]
    inside = (down < OUT[0]) & (right < OUT[1])
    inside &= (slot < n_planes)[None, :, None] & (spot < n_pixels)[:, None, :]
    first = block[:, None, :].to(tl.int64) * IMAGES
    out += down * OUT[1] + right
    for image in range(0, tl.minimum(IMAGES, n_images)):  # unrolled, it spills at 32 planes
        one = tl.sum(tl.where(lane == image, sums, 0.0), 3)  # moves nothing: a thread holds all images of its pixel
        to = out + ((first + image) * channels + channel[None, :, None]) * (OUT[0] * OUT[1])
        tl.store(to, one.to(out.dtype.element_ty), mask=inside & (first + image < n_images))


def forward(
    x: Tensor, values: Tensor, taps: Taps, bias: Tensor | None, geometry: Geometry, relu: bool = False
) -> Tensor:
    """y = conv2d(x, W) + bias, and a ReLU on request, with sums in float32.

    Args:
        x: input [B, Cin, H, W], float32, bfloat16 or float16, any strides.
        values: kept weights [nnz] in row-major order of the mask seen as [Cout, kh, kw, Cin / groups], of x's dtype
            or float32.
        taps: where they lie, made for `geometry`.
        bias: [Cout] of x's dtype or float32, or None.

    Returns:
        y [B, Cout, OH, OW] of x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(x, "x", (_inputs(taps), *x.shape[2:]), values, taps, geometry)
    n_outputs = len(taps.forward.by_length)
    if bias is not None and (bias.shape != (n_outputs,) or bias.device != x.device):
        raise ValueError(f"bias must be ({n_outputs},) on {x.device}, got {tuple(bias.shape)} on {bias.device}")
    size = geometry.output_size(tuple(x.shape[2:]))
    y = x.new_empty(len(x), n_outputs, *size)
    window = tuple(
        (pixels - 1) * step + (kernel - 1) * apart + 1
        for pixels, kernel, step, apart in zip(size, geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    )
    corner = [-pad for pad in geometry.padding]
    bias = None if bias is None else bias.contiguous()
    return _convolve(x, values, taps.forward, bias, y, corner, window, geometry.stride, (1, 1), relu, True)


def input_gradient(dy: Tensor, values: Tensor, taps: Taps, geometry: Geometry, input_size: tuple[int, int]) -> Tensor:
    """Gradient of the input of `input_size` (H, W) of a convolution, from `dy`, that of its output.

    Args:
        dy: [B, Cout, OH, OW], float32, bfloat16 or float16, any strides.
        values, taps: as of `forward`.

    Returns:
        dx [B, Cin, H, W] of dy's dtype, contiguous, with sums in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(dy, "dy", (len(taps.forward.by_length), *geometry.output_size(tuple(input_size))), values, taps, geometry)
    dx = dy.new_empty(len(dy), _inputs(taps), *input_size)
    before = furthest(geometry)
    window = tuple(
        triton.cdiv(pixels, step) + b + -(-pad // step)
        for pixels, b, step, pad in zip(input_size, before, geometry.stride, geometry.padding, strict=True)
    )
    corner = [-b for b in before]
    return _convolve(dy, values, taps.gradient, None, dx, corner, window, (1, 1), geometry.stride, False, False)


def _inputs(taps):
    """Input channels of the convolution."""
    return len(taps.gradient.by_length) // (taps.geometry.stride[0] * taps.geometry.stride[1])


def _convolve(source, values, reads: Reads, bias, out, corner, window, steps, phases, relu, relative):
    """Fill `out` with the planes that `reads` lists, from `window` pixels of the source, its first at `corner`."""
    batch, channels, *size = out.shape
    images = min(16 // source.element_size(), triton.next_power_of_2(max(batch, 1)))
    blocks, pixels = triton.cdiv(batch, images), source.shape[1] * window[0] * window[1]
    if pixels * images >= 2**31:
        raise ValueError(f"{images} images of {source.shape[1]} x {window[0]} x {window[1]} pixels pass 2**31")
    if out.numel() == 0:
        return out
    side_by_side = source.new_empty(blocks, pixels, images)
    _interleave_kernel[(triton.cdiv(pixels, BLOCK), blocks)](
        source, side_by_side, batch, source.shape[1], *source.shape[2:], *corner, *source.stride(),
        WINDOW=window, BLOCK=BLOCK, IMAGES=images, num_warps=4,
    )  # fmt: skip
    phase = tuple(triton.cdiv(n, phases) for n, phases in zip(size, phases, strict=True))
    planes, n_pixels = len(reads.by_length), blocks * phase[0] * phase[1]
    group, tiles = _shape(planes, n_pixels, images)
    _direct_kernel[(triton.cdiv(n_pixels, tiles * LANES), triton.cdiv(planes, group))](
        side_by_side, values.contiguous(), reads.starts, reads.places, reads.order, reads.by_length, bias, out,
        planes, n_pixels, batch, channels, source.shape[1],
        WINDOW=window, STEPS=steps, OUT=tuple(size), PHASES=phases, PHASE=phase,
        RELATIVE=relative, HAS_BIAS=bias is not None, RELU=relu, TILES=tiles, GROUP=group, LANES=LANES, IMAGES=images,
        UNROLL=min(4, 32 // group), num_warps=min(group, 16), maxnreg=REGISTERS,  # 4 to 8 loads of 16 bytes in flight
    )  # fmt: skip
    return out


def _shape(planes, pixels, images):
    """Planes, and tiles of LANES pixels, of a program: the most that still make `PROGRAMS`, or else the fewest."""
    for group, positions in SHAPES:
        tiles = min(4, max(1, positions // (LANES * images)))
        if triton.cdiv(planes, group) * triton.cdiv(pixels, LANES * tiles) >= PROGRAMS:
            break
    return group, tiles


def _check(source, name, shape, values, taps, geometry):
    if taps.geometry != geometry:
        raise ValueError(f"the taps were made for {taps.geometry}, not for {geometry}")
    if source.dim() != 4 or source.shape[1:] != shape:
        raise ValueError(f"{name} must be [B, {', '.join(map(str, shape))}], got {tuple(source.shape)}")
    if values.shape != taps.forward.order.shape:
        raise ValueError(f"values must be {tuple(taps.forward.order.shape)} of the taps, got {tuple(values.shape)}")
    if source.dtype not in DTYPES or values.dtype not in (source.dtype, torch.float32):
        raise ValueError(
            f"{name} must be one of {NAMES} and values its dtype or float32, got {source.dtype} and {values.dtype}"
        )
    if not source.device == values.device == taps.forward.order.device:
        raise ValueError(
            f"{name}, values and taps must be on one device, got {source.device}, {values.device} and "
            f"{taps.forward.order.device}"
        )
