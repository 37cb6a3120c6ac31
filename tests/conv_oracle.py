"""What the tests of the convolution kernels share: geometries, awkward masks, and a layer with its float64 oracle."""

from typing import NamedTuple

import torch
from kernel_oracle import DEVICE, random
from lth_sparse.kernels.geometry import Geometry, conv_rows, geometry
from lth_sparse.kernels.pattern import Bitmap, bitmap
from torch import Tensor
from torch.nn.functional import conv2d

MASKS = ["random", "all", "one", "none", "empty output", "empty input", "empty tap"]
# batch, Cin, Cout, H, W; then kernel, stride, padding, dilation, groups
SHAPES = {
    "3x3": ((2, 64, 70, 7, 9), (3, 1, 1, 1, 1)),
    "first layer, strided": ((5, 3, 16, 11, 11), (3, 2, 1, 1, 1)),
    "grey 5x5": ((1, 1, 8, 9, 8), (5, 1, 2, 1, 1)),
    "1x1 stride 2": ((5, 33, 65, 7, 9), (1, 2, 0, 1, 1)),
    "1x3 stride 2, 1": ((1, 33, 40, 8, 6), ((1, 3), (2, 1), (0, 1), 1, 1)),
    "dilated": ((1, 3, 8, 11, 10), (3, 1, 2, 2, 1)),
    "dilated by its stride": ((2, 8, 9, 9, 8), (3, 2, 2, 2, 1)),
    "stride beyond the kernel": ((2, 8, 8, 1, 9), (1, 4, 0, 1, 1)),
    "5x5 stride 2 dilated": ((2, 6, 4, 13, 12), (5, 2, (2, 1), (1, 2), 1)),
    "groups": ((3, 66, 8, 6, 5), (3, 1, 1, 1, 2)),
    "depthwise": ((2, 4, 8, 6, 6), (3, (2, 1), 1, 1, 4)),
}


class Layer(NamedTuple):
    """A masked convolution with operands; `weight`, dense with zeros, is float32."""

    x: Tensor
    dy: Tensor
    weight: Tensor
    mask: Tensor
    bias: Tensor
    geometry: Geometry

    @property
    def values(self) -> Tensor:
        return packed(self.weight, self.mask)

    @property
    def bits(self) -> Bitmap:
        return bitmap(conv_rows(self.mask))

    def in_other_strides(self) -> "list[Layer]":
        """The same with images contiguous, and as slices of wider images with output gradients reversed in memory."""
        batch, channels, *size = self.x.shape
        wide = torch.zeros(batch, channels + 5, *size, device=DEVICE).contiguous(memory_format=torch.channels_last)
        wide[:, 3:-2] = self.x
        return [
            self._replace(x=self.x.contiguous(), dy=self.dy.contiguous()),
            self._replace(x=wide[:, 3:-2], dy=self.dy.flip(3).contiguous().flip(3)),
        ]

    def gradients(self, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Output without bias, input gradient and dense weight gradient in torch's `dtype`, on the layer's device."""
        x, weight = (t.detach().to(device, dtype).requires_grad_() for t in (self.x, self.weight))
        _, stride, padding, dilation, groups, *_ = self.geometry
        y = conv2d(x, weight, None, stride, padding, dilation, groups)
        return tuple(t.detach().to(DEVICE) for t in (y, *torch.autograd.grad(y, (x, weight), self.dy.to(x))))


def layer(name, kind="random", dtype=torch.float32, sizes=None) -> Layer:
    """The layer called `name` in SHAPES, or of `sizes` by its arguments, channels_last."""
    (batch, inputs, outputs, *size), arguments = SHAPES[name]
    batch, inputs, outputs, *size = sizes or (batch, inputs, outputs, *size)
    window = geometry(*arguments)
    mask = make_mask(kind, outputs, inputs // window.groups, *window.kernel)
    x = random(batch, inputs, *size, dtype=dtype)
    dy = random(batch, outputs, *window.output_size(tuple(size)), dtype=dtype, seed=1)
    weight = random(*mask.shape, seed=2) * mask
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    return Layer(x, dy, weight, mask, random(outputs, seed=3), window)


def make_mask(kind, outputs, inputs, high, wide):
    """Bool [Cout, Cin / groups, kh, kw]; "random" keeps a fifth."""
    mask = torch.ones(outputs, inputs, high, wide, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(mask.shape, generator=torch.Generator().manual_seed(4)) < 0.2
        mask[0, 0, 0, 0] = True
    elif kind in ("one", "none"):
        mask.fill_(False)
        mask[outputs // 2, inputs // 3, high - 1, wide // 2] = kind == "one"
    elif kind == "empty output":
        mask[outputs // 2] = False
    elif kind == "empty input":
        mask[:, inputs // 2] = False
    elif kind == "empty tap":
        mask[:, :, high // 2, wide // 2] = False
    return mask.to(DEVICE)


def packed(weight, mask):
    """The kept entries [nnz] of a weight [Cout, Cin / groups, kh, kw], channels last."""
    return conv_rows(weight)[conv_rows(mask)]


def within_tf32(ours, wanted, magnitude):
    """Off by no more than both operands cut to 10 bits can be, given the sums of the products' magnitudes."""
    return ours.shape == wanted.shape and bool(((ours - wanted).abs() <= 2**-9 * magnitude + 1e-30).all())
