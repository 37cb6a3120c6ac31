"""How a 2-D convolution is laid out, in numbers that need no kernel."""

import math
from typing import NamedTuple

from torch import Tensor


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
