"""Adam, AdamW and SGD over many tensors in one launch, which also refreshes the shadows of packed layers.

Sources: Kingma and Ba 2015 (Adam), Loshchilov and Hutter 2019 (AdamW), Sutskever et al. 2013 (momentum); formulas and
their order are those of torch's fused optimizers.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .pattern import unpack_bits
from .table import (
    BLOCK,
    COLUMNS,
    FIRST,
    GRADIENT,
    HALF,
    KEPT,
    SECOND,
    SHADOW,
    STEP,
    VALUE,
    Table,
    find,
    load,
    store,
)


@triton.jit
def _store_value(row, begin, left, value, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Store packed values, and scatter them to the shadow, if there is one; its zeros never change.

    At density 0.1 the scatter reads 0.4 and writes 2.3 bytes a weight, in sectors of 32, with 1.4 instructions; walking
    the shadow by its bitmap would read 0.25 and write 4, with 14 instructions. The bytes are equal at density 0.2.
    """
    store(row, VALUE, begin, left, value, WHOLE, BLOCK)
    shadow = tl.load(row + SHADOW)
    if shadow != 0:
        kept = load(row, KEPT, begin, left, WHOLE, BLOCK, tl.int32)
        inside = tl.arange(0, BLOCK) < left
        if tl.load(row + HALF) == 0:
            tl.store(shadow.to(tl.pointer_type(tl.float32)) + kept, value, mask=inside)
        else:
            tl.store(shadow.to(tl.pointer_type(tl.bfloat16)) + kept, value.to(tl.bfloat16), mask=inside)


@triton.jit
def one_less_power(log_beta, step):
    """1 - beta**step: by its series near 0, where float32 would keep only 14 bits of 1 - 0.999."""
    x = log_beta * step
    series = -x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6)))))
    return tl.where(x > -0.25, series, 1 - tl.exp(x))


@triton.jit
def _adam_block(
    row, begin, left, lr, beta1, beta2, step_size, root, eps, weight_decay,
    DECOUPLED: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value = load(row, VALUE, begin, left, WHOLE, BLOCK, tl.float32)
    gradient = load(row, GRADIENT, begin, left, WHOLE, BLOCK, tl.float32)
    first = load(row, FIRST, begin, left, WHOLE, BLOCK, tl.float32)
    second = load(row, SECOND, begin, left, WHOLE, BLOCK, tl.float32)
    if DECOUPLED:
        value -= lr * weight_decay * value
    else:
        gradient += weight_decay * value
    first = tl.fma(first, beta1, (1 - beta1) * gradient)
    second = tl.fma(second, beta2, (1 - beta2) * (gradient * gradient))
    value -= tl.div_rn(step_size * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
    store(row, FIRST, begin, left, first, WHOLE, BLOCK)
    store(row, SECOND, begin, left, second, WHOLE, BLOCK)
    _store_value(row, begin, left, value, WHOLE, BLOCK)


@triton.jit
def _adam_kernel(
    cells, n_tensors, lr, beta1, beta2, log_beta1, log_beta2, eps, weight_decay,
    DECOUPLED: tl.constexpr, LR_POINTER: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left, whole = find(cells, n_tensors, BLOCK)
    step = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32))) + 1
    tl.debug_barrier()  # all of the block has read the step before the block is counted,
    begun = tl.atomic_add(cells, 1) + 1
    if LR_POINTER:
        lr = tl.load(lr).to(tl.float32)
    step_size = tl.div_rn(lr, one_less_power(log_beta1, step))
    root = tl.sqrt_rn(one_less_power(log_beta2, step))
    if whole:
        _adam_block(row, begin, left, lr, beta1, beta2, step_size, root, eps, weight_decay, DECOUPLED, True, BLOCK)
    else:
        _adam_block(row, begin, left, lr, beta1, beta2, step_size, root, eps, weight_decay, DECOUPLED, False, BLOCK)
    if begun == tl.num_programs(0):  # so the one counted last may write the steps: no launch of their own
        at = tl.arange(0, TENSORS)
        steps = tl.load(cells + 1 + at * COLUMNS + STEP, mask=at < n_tensors, other=0).to(tl.pointer_type(tl.float32))
        tl.store(steps, tl.load(steps, mask=at < n_tensors, other=0) + 1, mask=at < n_tensors)
        tl.store(cells, 0)


@triton.jit
def _sgd_block(
    row, begin, left, lr, momentum, dampening, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    value = load(row, VALUE, begin, left, WHOLE, BLOCK, tl.float32)
    gradient = tl.fma(value, weight_decay, load(row, GRADIENT, begin, left, WHOLE, BLOCK, tl.float32))
    if MOMENTUM:
        first = load(row, FIRST, begin, left, WHOLE, BLOCK, tl.float32)
        first = tl.fma(first, momentum, (1 - dampening) * gradient)
        store(row, FIRST, begin, left, first, WHOLE, BLOCK)
        gradient = tl.fma(first, momentum, gradient) if NESTEROV else first
    _store_value(row, begin, left, value - lr * gradient, WHOLE, BLOCK)


@triton.jit
def _sgd_kernel(
    cells, n_tensors, lr, momentum, dampening, weight_decay,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, LR_POINTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, begin, left, whole = find(cells, n_tensors, BLOCK)
    if LR_POINTER:
        lr = tl.load(lr).to(tl.float32)
    if whole:
        _sgd_block(row, begin, left, lr, momentum, dampening, weight_decay, MOMENTUM, NESTEROV, True, BLOCK)
    else:
        _sgd_block(row, begin, left, lr, momentum, dampening, weight_decay, MOMENTUM, NESTEROV, False, BLOCK)


def adam_(
    table: Table,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
) -> None:
    """One step of Adam on every tensor of `table`, in place: values, moments, steps (plus 1) and shadows.

    Nothing is read by the host, so a CUDA graph can capture it; the graph follows a learning rate that is a tensor of
    one entry on the device.

    Args:
        decoupled: weight decay as AdamW has it, off the value; else it is added to the gradient.

    Raises:
        ValueError: an update without moments or step.
    """
    table.require("first", "second", "step")
    # The moments decay by float32 betas: correcting for others, Adam's first steps would err by 7e-6.
    beta1, beta2 = (float(np.float32(beta)) for beta in betas)
    logs = [math.log(beta) if beta else -math.inf for beta in (beta1, beta2)]
    lr, pointer = _learning_rate(lr, table)
    with torch.cuda.device_of(table.cells):
        _adam_kernel[(table.blocks,)](
            table.cells, table.tensors, lr, beta1, beta2, *logs, float(eps), float(weight_decay),
            DECOUPLED=decoupled, LR_POINTER=pointer, TENSORS=max(32, triton.next_power_of_2(table.tensors)),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def sgd_(
    table: Table,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> None:
    """One step of SGD on every tensor of `table`, in place: values, momentum (if it is not 0) and shadows.

    Momentum starts as zeros, which for a `dampening` of 0 is torch's first step. As `adam_` in all else.

    Raises:
        ValueError: `momentum` is not 0, and an update has no `first`.
    """
    if momentum:
        table.require("first")
    lr, pointer = _learning_rate(lr, table)
    with torch.cuda.device_of(table.cells):
        _sgd_kernel[(table.blocks,)](
            table.cells, table.tensors, lr, float(momentum), float(dampening), float(weight_decay),
            MOMENTUM=momentum != 0, NESTEROV=nesterov, LR_POINTER=pointer, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip


def kept_positions(words: Tensor, columns: int) -> Tensor:
    """Where packed values lie in a contiguous shadow [R, N, `columns`]: int32 [R * nnz], of a `Bitmap`'s words."""
    tickets, rows, width = words.shape
    mask = unpack_bits(words.contiguous().view(torch.uint8).flatten(), (tickets, rows, 32 * width))
    return mask[:, :, :columns].flatten().nonzero().flatten().int()


def _learning_rate(lr, table):
    """What the kernel is given, and whether that is a pointer; a tensor on the CPU is a number there."""
    pointer = isinstance(lr, Tensor) and lr.device == table.cells.device
    return (lr if pointer else float(lr)), pointer
