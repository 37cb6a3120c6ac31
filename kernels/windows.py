"""How the window of a 2-D convolution moves over an image, for the kernels that convolve without unfolding it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .geometry import Geometry
from .operands import DTYPES, NAMES, check_precision
from .pattern import Bitmap


def channels_last(tensor: Tensor) -> Tensor:
    """The same [B, C, H, W] with channels contiguous in memory; itself if they are, else a copy."""
    return tensor.contiguous(memory_format=torch.channels_last)


def check(
    geometry: Geometry, bitmap: Bitmap, x_shape: tuple[int, ...], y_shape: tuple[int, ...] | None, precision: str,
    **images: Tensor,
) -> tuple[int, ...]:  # fmt: skip
    """The output's shape [B, Cout, OH, OW] for an input of `x_shape` [B, Cin, H, W].

    Raises:
        ValueError: shapes that do not fit the masks of `conv_rows`, images of different dtypes or devices, or an
            unknown precision.
    """
    n_rows, n_words = bitmap.words.shape[1:]
    per_output, groups = geometry.taps * geometry.groups, geometry.groups
    fits = len(x_shape) == 4 and x_shape[1] % groups == 0 and -(-x_shape[1] // groups // 32) == n_words
    if not fits or n_rows % per_output:
        raise ValueError(
            f"an input {tuple(x_shape)} must be [B, Cin, H, W] for masks of {n_rows} rows and {n_words} words per row "
            f"by {geometry}"
        )
    wanted = (x_shape[0], n_rows // geometry.taps, *geometry.output_size(tuple(x_shape[2:])))
    if y_shape is not None and tuple(y_shape) != wanted:
        raise ValueError(f"an output for inputs {tuple(x_shape)} must be {wanted}, got {tuple(y_shape)}")
    first = next(iter(images.values()))
    if first.dtype not in DTYPES or any(image.dtype != first.dtype for image in images.values()):
        given = ", ".join(f"{name} {image.dtype}" for name, image in images.items())
        raise ValueError(f"images must have one dtype of {NAMES}, got {given}")
    if any(image.device != bitmap.words.device for image in images.values()):
        given = ", ".join(f"{name} on {image.device}" for name, image in images.items())
        raise ValueError(f"images must be on the device of the masks, {bitmap.words.device}, got {given}")
    check_precision(precision)
    return wanted


@triton.jit
def window(position, OUT: tl.constexpr, G: tl.constexpr):
    """Image of each output position, and the input pixel, maybe of the padding, where its window begins.

    Unsigned, and by constants: the divisions then are shifts or multiplications, 30% fewer instructions in a loop.
    """
    position = position.to(tl.uint32)
    image, pixel = position // (OUT[0] * OUT[1]), position % (OUT[0] * OUT[1])
    down, right = (pixel // OUT[1]).to(tl.int32), (pixel % OUT[1]).to(tl.int32)
    return image, down * G.stride[0] - G.padding[0], right * G.stride[1] - G.padding[1]


@triton.jit
def within(down, right, SIZE: tl.constexpr):
    """Whether pixels lie in an image of SIZE."""
    return (down.to(tl.uint32, bitcast=True) < SIZE[0]) & (right.to(tl.uint32, bitcast=True) < SIZE[1])
