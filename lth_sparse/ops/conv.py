"""The strategies for 2-D convolutions: x [B, Cin, H, W], values [1, nnz], masks [1, Cout, kh, kw, Cin / groups].

Weights lie channels last, so that the weights of a tap are neighbours, and so do the images that matrix kernels take.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.geometry import geometry
from ..kernels.pattern import Bitmap, bitmap
from .strategy import Strategy, kernels, picklable, precision, unsigned


def conv_sizes(layer: nn.Conv2d) -> tuple[int, ...]:
    """The `sizes` of a convolution: Cout; kernel, stride, padding and dilation, each down and right; groups.

    Padding is what the product itself does: none where the layer pads its input first, with other than zeros or "same".
    """
    padding = (0, 0) if pads_first(layer) else layer.padding
    pairs = layer.kernel_size, layer.stride, padding, layer.dilation
    return layer.out_channels, *(size for pair in pairs for size in pair), layer.groups


def conv_options(sizes: tuple[int, ...]) -> dict:
    """The keyword arguments that `sizes` stand for in `torch.nn.functional.conv2d`."""
    _, _, _, *pairs, groups = sizes
    return {"stride": pairs[0:2], "padding": pairs[2:4], "dilation": pairs[4:6], "groups": groups}


def pads_first(layer: nn.Conv2d) -> bool:
    """Whether the input is padded before the product."""
    return isinstance(layer.padding, str) or layer.padding_mode != "zeros"


class Dense(Strategy):
    """cuDNN's products with the shadow, and a weight gradient that is stored packed."""

    def structures(self, masks, sizes):
        return tuple(bitmap(masks.flatten(1, 3)))

    def live(self, masks):
        return masks

    def forward(self, x, values, bias, shadow, pattern, sizes):
        bias = None if bias is None else bias[0].to(x.dtype)
        return _last(F.conv2d(_last(x), _weight(shadow, x), bias, **conv_options(sizes)))

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        return _last(nn.grad.conv2d_input(shape, _weight(shadow, dy), _last(dy), **conv_options(sizes)))

    def weight_gradient(self, dy, x, values, pattern, sizes):
        module, bits = kernels("conv_weight_gradient"), Bitmap(*pattern)
        found = module.weight_gradient(dy, x, bits, values.shape[1], _geometry(sizes), precision=precision())
        return found[0][None], found[1][None]

    def empty(self, x, shape):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


class Shrunk(Dense):
    """As dense, without the input and output channels that keep nothing; one group."""

    def structures(self, masks, sizes):
        return *_alive(masks), *super().structures(self.live(masks), sizes)

    def live(self, masks):
        outputs, inputs = _alive(masks)
        return masks[:, outputs][..., inputs]

    def forward(self, x, values, bias, shadow, pattern, sizes):
        outputs, inputs, *inner = pattern
        small = None if bias is None else bias[:, outputs]
        live = super().forward(x.index_select(1, inputs), values, small, shadow, inner, sizes)
        y = x.new_zeros(()) if bias is None else bias.to(x.dtype)[0, :, None, None]
        y = _last(y.expand(len(x), sizes[0], *live.shape[2:]))
        return y.index_copy_(1, outputs, live)

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        outputs, inputs, *inner = pattern
        small = shape[0], len(inputs), *shape[2:]
        live = super().input_gradient(dy.index_select(1, outputs), values, shadow, inner, sizes, small)
        return self.empty(dy, shape).zero_().index_copy_(1, inputs, live)

    def weight_gradient(self, dy, x, values, pattern, sizes):
        outputs, inputs, *inner = pattern
        small = dy.index_select(1, outputs), x.index_select(1, inputs)
        return super().weight_gradient(*small, values, inner, sizes)[0], dy.sum((0, 2, 3), dtype=torch.float32)[None]


def _alive(masks):
    """Output and input channels that keep anything; the first if none does, as no convolution has none."""
    alive = masks[0].flatten(1).any(1), masks[0].flatten(0, 2).any(0)
    return [channels.nonzero()[:, 0] if masks.any() else channels.new_zeros(1, dtype=torch.int64) for channels in alive]


class Expanded(Dense):
    """Implicit GEMMs with the packed values, expanded tile by tile in registers: no shadow."""

    def live(self, masks):
        return None

    def forward(self, x, values, bias, shadow, pattern, sizes):
        module, bias = kernels("conv_bitmap"), None if bias is None else bias[0]
        return module.forward(x, values[0], Bitmap(*pattern), bias, _geometry(sizes), precision=precision())

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        input_gradient, bits = kernels("conv_bitmap").input_gradient, Bitmap(*pattern)
        return input_gradient(dy, values[0], bits, _geometry(sizes), tuple(shape), precision=precision())


class Direct(Dense):
    """Kept taps alone, on the CUDA cores, forward and for the input; the weight gradient as in dense."""

    def structures(self, masks, sizes):
        found = kernels("taps").taps(masks[0].permute(0, 3, 1, 2), _geometry(sizes))
        return *super().structures(masks, sizes), *picklable((*found.forward, *found.gradient))

    def live(self, masks):
        return None

    def forward(self, x, values, bias, shadow, pattern, sizes):
        module, bias = kernels("conv_direct"), None if bias is None else bias[0]
        return module.forward(x, values[0], _taps(pattern, sizes), bias, _geometry(sizes))

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        input_gradient, size = kernels("conv_direct").input_gradient, tuple(shape[2:])
        return input_gradient(dy, values[0], _taps(pattern, sizes), _geometry(sizes), size)

    def weight_gradient(self, dy, x, values, pattern, sizes):
        return super().weight_gradient(dy, x, values, pattern[:2], sizes)

    def empty(self, x, shape):
        return x.new_empty(shape)


def output_shape(x_shape: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """[B, Cout, OH, OW] of an input [B, Cin, H, W]; ValueError if the window does not fit into it."""
    return x_shape[0], sizes[0], *_geometry(sizes).output_size(x_shape[2:])


def _geometry(sizes):
    return _window(*sizes[1:])


@cache
def _window(*sizes):
    """Checked once for each kind of convolution, not in each of its three products."""
    return geometry(sizes[0:2], sizes[2:4], sizes[4:6], sizes[6:8], sizes[8])


def _taps(pattern, sizes):
    module = kernels("taps")
    lists = unsigned(pattern[2:])
    return module.Taps(_geometry(sizes), module.Reads(*lists[:4]), module.Reads(*lists[4:]))


def _weight(shadow, like):
    return shadow[0].permute(0, 3, 1, 2).to(like.dtype)


def _last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


CONV2D = {"dense": Dense(), "bitmap": Expanded(), "csr": Direct(), "shrink": Shrunk()}
