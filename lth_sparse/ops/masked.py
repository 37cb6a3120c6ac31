"""Operators of the masked state: dense products, and a weight gradient that is exactly zero off the mask."""

import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .strategy import Strategy, kernels, launches, precision

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FEW = 2**20  # weights of a layer whose products a GPU is through with before it has been told the next
_MAPPED = 2**25  # bytes that malloc maps afresh each time, whatever it has learnt


def apply_mask(tensor: Tensor, mask: Tensor) -> Tensor:
    """`tensor` where the bool `mask` of the same shape is set, else exactly zero, even where it is NaN or infinite."""
    if tensor.requires_grad or not tensor.is_cpu or tensor.is_complex() or torch._C._are_functorch_transforms_active():
        return torch.where(mask, tensor, 0)
    # The bits times 0 or 1: 0.11 ms against 0.79 ms for where on a 300 x 784 layer, one core (torch 2.15).
    bits = tensor.view(_INTEGER[tensor.itemsize]) * mask.view(torch.uint8)
    return bits.view(tensor.dtype)


class _MaskGradient(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight, mask):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient):
        return apply_mask(gradient, ctx.saved_tensors[0]), None


def mask_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    """Return `weight` unchanged (no copy); its gradient is exactly zero off the bool `mask` of the same shape."""
    return _MaskGradient.apply(weight, mask)


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, fused: bool = False) -> Tensor:
    """y [..., N] = x [..., K] weight^T + bias, for a weight [N, K] zero off its bool mask; so is its gradient.

    `fused` has our own kernel compute the weight gradient, which then is masked as it is stored; without, in a second
    pass.
    """
    if (weight.is_cpu or fused) and _is_plain(x, weight, bias):
        return F.linear(x, weight, bias) if _bits(mask).keeps_all else _MaskedLinear.apply(x, weight, mask, bias, fused)
    return F.linear(x, mask_gradient(weight, mask), bias)


def _is_plain(x, weight, bias):
    """Whether an eager training step calls, in one dtype that needs no cast."""
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled(weight.device.type)
        and x.dtype == weight.dtype == (weight if bias is None else bias).dtype
        and x.dim() > 1
        and type(x) in (Tensor, torch.nn.Parameter)
    )


class _Bits(NamedTuple):
    """What a mask's products with gradients need, made again only when the mask was written."""

    version: int
    keeps_all: bool
    words: dict[int, Tensor]  # by itemsize: all ones or all zeros for each weight


def _bits(mask):
    bits = getattr(mask, "bits", None)
    if bits is None or bits.version != mask._version:
        bits = mask.bits = _Bits(mask._version, bool(mask.all()), {})
    return bits


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, mask, bias, fused):
        ctx.save_for_backward(x, weight, mask)
        ctx.fused = fused
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, mask = ctx.saved_tensors
        wants_x, _, _, wants_bias, _ = ctx.needs_input_grad
        rows, dy_rows, dbias = (x, dy, None) if x.dim() == 2 else (x.flatten(0, -2), dy.flatten(0, -2), None)
        if torch.is_grad_enabled():  # to be differentiated again
            weight, gradient = mask_gradient(weight, mask), apply_mask(dy_rows.t() @ rows, mask)
        elif ctx.fused:
            kernel = kernels("weight_gradient").masked_weight_gradient
            gradient, dbias = kernel(dy_rows[None], rows[None], mask[None], wants_bias, precision())
            gradient, dbias = gradient[0].to(weight.dtype), dbias if dbias is None else dbias[0].to(weight.dtype)
        else:
            gradient = _masked_product(dy_rows.t(), rows, mask, _like(weight))
        if wants_bias and dbias is None:
            dbias = dy_rows.sum(0)
        return dy @ weight if wants_x else None, gradient, None, dbias, None


def _masked_product(a, b, mask, out):
    """a @ b in `out`, zero off the mask.

    By words of all ones or all zeros as wide as a weight, which are kept with the mask: a step at 2048 x 2048 takes
    1.09x the dense one and 1.07x at 4096 x 4096, by the mask's own bytes 1.12 to 1.35x, block by block in cache, and
    1.65x in a pass of their own (batch 60, two threads, torch 2.15).
    """
    integer, words = _INTEGER[out.itemsize], _bits(mask).words
    if out.itemsize not in words:
        words[out.itemsize] = -mask.to(integer)
    torch.mm(a, b, out=out).view(integer).bitwise_and_(words[out.itemsize])
    return out


class Masked(Strategy):
    """The masked state of R Linear layers as a strategy: `values` are dense weights [R, N, K], zero off the masks.

    Where kernels run, each product of small layers is one launch with bias, ReLU, its gate or the mask in it; large
    layers leave all but the weight gradient to cuBLAS.
    """

    def structures(self, masks, sizes):
        return (masks,) if launches(masks) else masks.unbind()

    def forward(self, x, values, bias, shadow, pattern, sizes, relu=False):
        if launches(values) and values[0].numel() <= _FEW:
            return kernels("dense_linear").forward(x, values, bias, relu, precision())
        if x.dtype != values.dtype:
            values, bias = values.to(x.dtype), bias.to(x.dtype)
        y = F.linear(x[0], values[0], bias[0])[None] if len(x) == 1 else torch.baddbmm(bias[:, None], x, values.mT)
        return y.relu_() if relu else y

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape, gate=None):
        if launches(values) and values[0].numel() <= _FEW:
            return kernels("dense_linear").input_gradient(dy, values, gate, precision())
        values = values if dy.dtype == values.dtype else values.to(dy.dtype)
        dx = torch.mm(dy[0], values[0])[None] if len(dy) == 1 else torch.bmm(dy, values)
        return dx if gate is None else torch.ops.aten.threshold_backward(dx, gate, 0)

    def weight_gradient(self, dy, x, values, pattern, sizes):
        if launches(values):
            return kernels("weight_gradient").masked_weight_gradient(dy, x, *pattern, True, precision())
        gradient = torch.empty_like(values) if values.grad is None else values.grad  # the memory of the last step
        for ticket, mask in enumerate(pattern):
            if _bits(mask).keeps_all:
                torch.mm(dy[ticket].t(), x[ticket], out=gradient[ticket])
            else:
                _masked_product(dy[ticket].t(), x[ticket], mask, gradient[ticket])
        return gradient, dy.sum(1)

    def activated(self, *given):
        return self.forward(*given, relu=True)

    def gated(self, *given):
        return self.input_gradient(*given)


_memory = WeakTensorKeyDictionary()  # the memory of each weight's last gradient


def _like(weight):
    """An uninitialised gradient of `weight`; a large one in the memory of the last, as soon as no tensor uses that.

    Mapping fresh memory page by page takes 23 of the 37 ms of a gradient at 4096 x 4096 (batch 60, two threads).
    """
    if weight.nbytes < _MAPPED:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    memory = _memory.pop(weight, None)  # popped, so that no other thread finds it
    if memory is None or sys.getrefcount(memory) > 2 or memory.size != weight.nbytes:
        memory = torch.empty(weight.nbytes, dtype=torch.uint8).numpy()
    _memory[weight] = memory
    return torch.from_numpy(memory).view(weight.dtype).view(weight.shape)
