"""The strategies for Linear layers, R tickets at once: x [R, B, K], values [R, nnz], bias [R, N], masks [R, N, K]."""

import torch
import torch.nn.functional as F

from ..kernels.groups import Groups, groups
from ..kernels.pattern import Bitmap, bitmap
from .cpu import Cpu
from .strategy import BatchLast, Strategy, kernels, picklable, precision, unsigned


class Dense(Strategy):
    """Dense products with the shadow, and a weight gradient that is stored packed."""

    def structures(self, masks, sizes):
        return tuple(bitmap(masks))

    def live(self, masks):
        return masks

    def forward(self, x, values, bias, shadow, pattern, sizes):
        shadow, bias = shadow.to(x.dtype), bias if bias is None else bias.to(x.dtype)
        if len(x) == 1:
            return F.linear(x[0], shadow[0], bias if bias is None else bias[0])[None]
        return x @ shadow.mT if bias is None else torch.baddbmm(bias[:, None], x, shadow.mT)

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        return dy @ shadow.to(dy.dtype)

    def weight_gradient(self, dy, x, values, pattern, sizes):
        weight_gradient = kernels("weight_gradient").weight_gradient
        return weight_gradient(dy, x, Bitmap(*pattern), values.shape[1], precision=precision())


class Shrunk(Dense):
    """As dense, without the rows and columns of the weight that keep nothing; one ticket."""

    def structures(self, masks, sizes):
        return *_alive(masks), *super().structures(self.live(masks), sizes)

    def live(self, masks):
        rows, columns = _alive(masks)
        return masks[:, rows][:, :, columns]

    def forward(self, x, values, bias, shadow, pattern, sizes):
        rows, columns, *inner = pattern
        small = None if bias is None else bias[:, rows]
        live = super().forward(x.index_select(2, columns), values, small, shadow, inner, sizes)
        y = x.new_zeros(()) if bias is None else bias.to(x.dtype)[:, None]
        return y.expand(*x.shape[:2], sizes[0]).index_copy(2, rows, live)

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        rows, columns, *inner = pattern
        live = super().input_gradient(dy.index_select(2, rows), values, shadow, inner, sizes, shape)
        return dy.new_zeros(shape).index_copy_(2, columns, live)

    def weight_gradient(self, dy, x, values, pattern, sizes):
        rows, columns, *inner = pattern
        small = dy.index_select(2, rows), x.index_select(2, columns)
        return super().weight_gradient(*small, values, inner, sizes)[0], dy.sum(1, dtype=torch.float32)


def _alive(masks):
    return masks[0].any(1).nonzero()[:, 0], masks[0].any(0).nonzero()[:, 0]


class Expanded(Dense):
    """Products with the packed values, expanded tile by tile in registers: no shadow."""

    def live(self, masks):
        return None

    def forward(self, x, values, bias, shadow, pattern, sizes, relu=False):
        return kernels("bitmap_linear").forward(x, values, Bitmap(*pattern), bias, relu, precision())

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape, gate=None):
        input_gradient = kernels("bitmap_linear").input_gradient
        return input_gradient(dy, values, Bitmap(*pattern), shape[2], precision(), gate)

    def activated(self, *given):
        return self.forward(*given, relu=True)

    def gated(self, *given):
        return self.input_gradient(*given)


class Listed(BatchLast):
    """One product for each kept weight, on the CUDA cores."""

    def structures(self, masks, sizes):
        return picklable(groups(masks))

    def forward(self, x, values, bias, shadow, pattern, sizes):
        return kernels("csr_linear").forward(x, values, _groups(pattern), bias)

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape):
        return kernels("csr_linear").input_gradient(dy, values, _groups(pattern))

    def weight_gradient(self, dy, x, values, pattern, sizes):
        return kernels("csr_linear").weight_gradient(dy, x, _groups(pattern))

    def empty(self, x, shape):
        tickets, batch, width = shape
        line = 128 // x.element_size()  # each output begins a cache line
        return x.new_empty(tickets, width, -(-batch // line) * line)[:, :, :batch].mT


def _groups(pattern):
    return Groups(*unsigned(pattern))


LINEAR = {"cpu": Cpu(), "dense": Dense(), "bitmap": Expanded(), "csr": Listed(), "shrink": Shrunk()}
