"""How the window of a 2-D convolution moves over an image, for the kernels that convolve without unfolding it."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pattern import Bitmap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRECISIONS = ("ieee", "tf32", "tf32x3")


class Geometry(NamedTuple):
    """A convolution as `geometry` describes it, in pairs (down, right); a compile-time constant of the kernels.

    `taps`: of the window. `apart`: how many taps lie from one to the next that reaches the same input pixel.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    taps: int
    apart: tuple[int, int]

    def output_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output for an input of `size`.

        Raises:
            ValueError: the window is larger than the padded input.
        """
        reach = [pixels + 2 * pad for pixels, pad in zip(size, self.padding, strict=True)]
        spans = [(kernel - 1) * apart + 1 for kernel, apart in zip(self.kernel, self.dilation, strict=True)]
        if any(span > pixels for span, pixels in zip(spans, reach, strict=True)):
            raise ValueError(f"a window of {tuple(spans)} does not fit into a padded input of {tuple(reach)}")
        down, right = [(r - s) // by + 1 for r, s, by in zip(reach, spans, self.stride, strict=True)]
        return down, right


def geometry(kernel_size, stride=1, padding=0, dilation=1, groups: int = 1) -> Geometry:
    """The `Geometry` of `torch.nn.Conv2d`'s arguments: ints, or pairs of them.

    Raises:
        ValueError: an argument that is neither, or too small.
    """
    given = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    pairs = {name: (value, value) if isinstance(value, int) else tuple(value) for name, value in given.items()}
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or not all(isinstance(value, int) and value >= least for value in pair):
            raise ValueError(f"{name} must be an int or a pair of ints from {least} on, got {given[name]!r}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    (high, wide), strides, _, dilations = pairs.values()
    apart = tuple(by // math.gcd(by, dilated) for by, dilated in zip(strides, dilations, strict=True))
    return Geometry(*pairs.values(), groups, high * wide, apart)


def conv_rows(mask: Tensor) -> Tensor:
    """A convolution's mask [Cout, Cin / groups, kh, kw] as masks [1, Cout * kh * kw, Cin / groups], channels last.

    Its `Bitmap` has a row for each tap of each output channel, which begins at a word; packed values are in its order.
    """
    return mask.permute(0, 2, 3, 1).reshape(1, -1, mask.shape[1])


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
        raise ValueError(f"images must have one dtype of {', '.join(str(d)[6:] for d in DTYPES)}, got {given}")
    if any(image.device != bitmap.words.device for image in images.values()):
        given = ", ".join(f"{name} on {image.device}" for name, image in images.items())
        raise ValueError(f"images must be on the device of the masks, {bitmap.words.device}, got {given}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
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
