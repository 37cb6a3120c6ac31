"""What a training step of a layer must move and multiply at least, by strategy, and how long this machine needs for it.

Bytes and flops are counted from the real index structures of a mask. A step is forward, input and weight gradient, and
Adam in the dtype of the layer; each tensor is read or written once per product, as if caches held nothing between them.
"""

import math
import time
from functools import cache
from typing import NamedTuple

import torch

from . import ops
from .dispatch import MASKED, Layer


class Cost(NamedTuple):
    """Of one step: floating-point operations, bytes moved; and bytes resident between steps."""

    flops: int
    bytes: int
    resident: int


class Machine(NamedTuple):
    """Measured limits of a device: bytes per second from memory, and multiply-adds per second times two."""

    bandwidth: float
    rate: float


def step_cost(layer: Layer, strategy: str) -> Cost:
    """The `Cost` of a layer at its input shape; "masked" and "fused" are the dense layer with its bool mask.

    (On the CPU a masked Linear keeps its mask in the width of the weights too, which is not counted.)

    Resident are values, gradient and two moments, the shadow and where values lie in it, all index structures, and the
    bits of the mask.
    """
    kind, masks, sizes, dtype, shape, _ = layer
    size, total, nnz = dtype.itemsize, masks.numel(), int(masks.count_nonzero())
    outputs = shape[0] * sizes[0] if kind == "linear" else math.prod(ops.output_shape(shape, sizes))
    images, positions = size * (math.prod(shape) + outputs), outputs // sizes[0]
    if strategy in MASKED:
        return Cost(6 * positions * total, 3 * images + 10 * size * total + total, (4 * size + 1) * total)
    how = ops.STRATEGIES[kind][strategy]
    pattern, live = how.structures(masks, sizes), how.live(masks)
    index = sum(tensor.nbytes for tensor in pattern)
    shadow = 0 if live is None else size * live.numel()
    products, gradient = _multiplied(kind, strategy, total, nnz, live)
    flops = 2 * positions * (2 * products + gradient)
    weights = shadow or size * nnz + index  # what each of the first two products reads
    step = 7 * size * nnz + (0 if live is None else (size + 4) * nnz)
    kept = 0 if live is None else 4 * nnz
    moved = 3 * images + 2 * weights + size * nnz + index + step
    return Cost(flops, moved, 4 * size * nnz + shadow + kept + index + math.ceil(total / 8))


def _multiplied(kind, strategy, total, nnz, live):
    """Weights that the forward and the weight gradient multiply, pruned ones included."""
    if strategy in ("csr", "cpu"):
        return nnz, nnz if kind == "linear" else total
    weights = total if live is None else live.numel()
    return weights, weights


def least_seconds(cost: Cost, machine: Machine) -> float:
    """The roofline: no step on `machine` takes less time."""
    return max(cost.flops / machine.rate, cost.bytes / machine.bandwidth)


@cache
def machine(device: torch.device, dtype: torch.dtype, threads: int = 0) -> Machine:
    """The limits of a device as torch reaches them: the best of several large copies and matrix products.

    `threads` is part of the question on the CPU (`torch.get_num_threads()`), not an instruction.
    """
    large = device.type == "cuda"
    source = torch.ones(2**28 if large else 2**25, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device)
    n = 8192 if large else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return Machine(2 * source.nbytes / copied, 2 * n**3 / _best(lambda: a @ b, device))


def _best(function, device, repeats=10) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(repeats):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
