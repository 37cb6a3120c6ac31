"""Perceptrons trained for many steps in one launch: one program, on one multiprocessor, for each ticket.

The products of a sparse ticket read from the first cache of a multiprocessor, and then nothing is worth a wait for
another one: 132 tickets train side by side on an H200, without a barrier between programs. Images stay bytes (LeNet:
50 kB of 64 images, where float32 would take 200 of the cache's 256), and what streams through once a step, like the
moments, may come from the second cache. Gradients of weights pass through memory: a sum over the batch is known to 4
threads or more, and each of them would have to compute Adam's 60 instructions.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import Groups
from .ticket_phases import (
    INPUT,
    LAYER_FIELDS,
    OUTPUT,
    PARAMETER_FIELDS,
    adam,
    adam_scalars,
    cross_entropy,
    forward,
    gather,
    input_gradient,
    lines,
    weight_gradient,
)

LINE = 64  # samples at least of a line of activations
BATCH, CLASSES = 128, 128  # at most: with more of either, tiles do not stay in registers
MULTIPROCESSOR = 227 * 1024  # bytes of first cache, of an H200's
WARPS, REGISTERS = 16, 128  # which is all that a multiprocessor has; left alone, the assembler spills to reach 64


class Layer(NamedTuple):
    """A Linear layer of R tickets: float32 `values` [R, nnz] and `bias` [R, N], their moments in Adam, and the masks'
    `groups`."""

    values: Tensor
    values_first: Tensor
    values_second: Tensor
    bias: Tensor
    bias_first: Tensor
    bias_second: Tensor
    groups: Groups


@triton.jit(do_not_specialize=["begun", "steps"])  # else it were compiled anew for 1 and for multiples of 16
def _train_kernel(
    layers, parameters, images, labels, indices, rates, loss_sum, batches, activations, gradients,
    n_layers, begun, steps, batch, pixels, classes, activations_size, gradients_size, scale, shift,
    beta1, beta2, log_beta1, log_beta2, eps, weight_decay,
    CLASSES: tl.constexpr, BATCH: tl.constexpr, ROWS: tl.constexpr, WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    ticket, tickets = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    x, activations = batches + ticket * pixels * BATCH, activations + ticket * activations_size
    gradients += ticket * gradients_size
    for step in range(steps):
        batch_indices = indices + (step * tickets + ticket) * batch
        gather(images, batch_indices, x, batch, pixels, PIXELS, BATCH)
        tl.debug_barrier()
        forward(layers, ticket, x, lines(layers, OUTPUT, activations), scale, shift, n_layers > 1, ROWS, BATCH)
        tl.debug_barrier()
        for depth in range(1, n_layers):
            layer = layers + depth * LAYER_FIELDS
            h, y = lines(layer, INPUT, activations), lines(layer, OUTPUT, activations)
            forward(layer, ticket, h, y, 1.0, 0.0, depth < n_layers - 1, ROWS, BATCH)
            tl.debug_barrier()
        logits = lines(layers + (n_layers - 1) * LAYER_FIELDS, OUTPUT, activations)
        cross_entropy(logits, labels, batch_indices, loss_sum + ticket, batch, classes, CLASSES, BATCH)
        tl.debug_barrier()
        for after in range(1, n_layers):
            layer = layers + (n_layers - after) * LAYER_FIELDS
            h, dy = lines(layer, INPUT, activations), lines(layer, OUTPUT, activations)
            weight_gradient(layer, ticket, dy, h, gradients, 1.0, 0.0, ROWS // 4, WEIGHTS, BATCH)
            tl.debug_barrier()
            input_gradient(layer, ticket, dy, h, ROWS, BATCH)
            tl.debug_barrier()
        dy = lines(layers, OUTPUT, activations)
        weight_gradient(layers, ticket, dy, x, gradients, scale, shift, ROWS // 2, WEIGHTS, BATCH)
        tl.debug_barrier()
        step_size, root = adam_scalars(tl.load(rates + step), (begun + step + 1).to(tl.float32), log_beta1, log_beta2)
        for at in range(2 * n_layers):
            parameter = parameters + at * PARAMETER_FIELDS
            adam(parameter, ticket, gradients, step_size, root, beta1, beta2, eps, weight_decay, BLOCK)
        tl.debug_barrier()


def train(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    scale: float,
    shift: float,
    layers: Sequence[Layer],
    step_count: int,
    lr: Tensor,
    loss_sum: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> None:
    """S steps of Adam on the mean cross-entropy of R perceptrons with a ReLU between layers, in place, in one launch.

    A ticket gets the same bits whatever the others are and however its steps are divided among launches. A CUDA graph
    cannot capture it: it counts steps on the host.

    Args:
        images: uint8 [n, P]; the input is images * scale + shift.
        labels: int64 [n], from 0 to C - 1, C at most 128, which nothing checks.
        indices: int64 [S, R, B], the batches: from 0 to n - 1, which nothing checks; B from 1 to 128.
        layers: from P features to C; all tensors contiguous, masks at most 65,536 wide; values, biases and moments are
            changed. Masks may keep nothing.
        step_count: steps that the moments have seen.
        lr: float32 [S].
        loss_sum: float32 [R]; grows by the mean loss of each step.
        weight_decay: added to the gradient times the parameter, as in torch.optim.Adam.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(images, labels, indices, layers, lr, loss_sum)
    (steps, tickets, batch), pixels, device = indices.shape, images.shape[1], images.device
    if not steps * tickets:
        return
    padded, n_neurons = _padded(batch), sum(layer.bias.shape[1] for layer in layers)
    # odd: else gradients would be read in vectors of four, and nothing else of a ticket is
    n_gradients = (n_neurons + sum(layer.values.shape[1] for layer in layers)) | 1
    classes = layers[-1].bias.shape[1]
    beta1, beta2 = (float(np.float32(beta)) for beta in betas)  # what the moments decay by
    _train_kernel[(tickets,)](
        *_tables(layers, padded), images, labels, indices, lr, loss_sum,
        torch.empty(tickets, pixels, padded, dtype=torch.uint8, device=device),
        torch.empty(tickets, n_neurons, padded, device=device), torch.empty(tickets, n_gradients, device=device),
        len(layers), step_count, steps, batch, pixels, classes, n_neurons * padded, n_gradients,
        float(scale), float(shift), beta1, beta2, *(math.log(beta) if beta else -math.inf for beta in (beta1, beta2)),
        float(eps), float(weight_decay),
        CLASSES=max(16, triton.next_power_of_2(classes)), BATCH=padded, ROWS=4096 // padded,
        WEIGHTS=8, BLOCK=1024, PIXELS=8192 // padded, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip


def fits(layers: Sequence[Layer], batch: int, device_bytes: int = MULTIPROCESSOR) -> bool:
    """Whether no phase of a step touches more than `device_bytes` of a ticket, the first cache of a multiprocessor.

    Those are a product of a layer, with its input, output, values and indices, and its update by Adam.
    """
    line, each = _padded(batch), 1  # bytes of a pixel
    for layer in layers:
        rows, columns = (starts.shape[1] - 1 for starts in (layer.groups.row_starts, layer.groups.column_starts))
        nnz = layer.values.shape[1]
        if max(line * (columns * each + rows * 4) + nnz * 6, nnz * 16) > device_bytes:
            return False
        each = 4
    return batch <= BATCH


def _padded(batch: int) -> int:
    return max(LINE, triton.next_power_of_2(batch))


def _tables(layers, line):
    """The rows of layers and of parameters, as `ticket_phases.py` has them, on the device."""
    rows, parameters, neurons, gradients = [], [], 0, 0
    for depth, (values, values_first, values_second, bias, bias_first, bias_second, groups) in enumerate(layers):
        nnz, n_rows, n_columns = values.shape[1], bias.shape[1], groups.long_columns.shape[1]
        addresses = [tensor.data_ptr() for tensor in (values, bias, *groups)]
        inputs = (neurons - n_columns) * line if depth else 0
        rows += [*addresses, n_rows, n_columns, nnz, inputs, neurons * line, gradients, gradients + nnz]
        for tensors in ((values, values_first, values_second), (bias, bias_first, bias_second)):
            size = tensors[0].shape[1]
            parameters += [*(tensor.data_ptr() for tensor in tensors), size, gradients]
            gradients += size
        neurons += n_rows
    device = layers[0].values.device
    host = torch.tensor(rows + parameters, dtype=torch.int64, pin_memory=device.type == "cuda")  # no wait for the copy
    return host.to(device, non_blocking=True).split([len(rows), len(parameters)])


def _check(images, labels, indices, layers, lr, loss_sum):
    if images.dim() != 2 or indices.dim() != 3 or not 1 <= indices.shape[2] <= BATCH or not layers:
        forms = f"{len(layers)} layers, {tuple(images.shape)} and {tuple(indices.shape)}"
        raise ValueError(f"training takes layers, images [n, P] and indices [S, R, 1 to {BATCH}], got {forms}")
    (n, width), (steps, tickets, _) = images.shape, indices.shape
    wanted = {
        "images": (images, torch.uint8, images.shape),
        "labels": (labels, torch.int64, (n,)),
        "indices": (indices, torch.int64, indices.shape),
        "lr": (lr, torch.float32, (steps,)),
        "loss_sum": (loss_sum, torch.float32, (tickets,)),
    }
    for depth, layer in enumerate(layers):
        form, rows = layer.values.shape[-1:], layer.bias.shape[-1]
        shapes = dict(zip(Layer._fields, [form] * 3 + [(rows,)] * 3, strict=False))
        shapes |= {"row_starts": (rows + 1,), "long_rows": (rows,), "columns": form, "order": form}
        shapes |= {"column_starts": (width + 1,), "long_columns": (width,), "rows": form}
        tensors = layer._asdict() | layer.groups._asdict()
        for name, shape in shapes.items():
            dtype = torch.float32 if name in Layer._fields else torch.int32
            dtype = torch.uint16 if name in ("rows", "columns") else dtype
            wanted[f"{name} of layer {depth}"] = tensors[name], dtype, (tickets, *shape)
        width = rows
    for name, (tensor, dtype, shape) in wanted.items():
        fit = tensor.shape == shape and tensor.dtype == dtype and tensor.device == images.device
        if not fit or not tensor.is_contiguous():
            form = f"{'' if tensor.is_contiguous() else 'non-contiguous '}{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
            needed = f"{str(dtype)[6:]} {tuple(shape)}, contiguous, on {images.device}"
            raise ValueError(f"{name} must be {needed}, got {form} on {tensor.device}")
    if width > CLASSES:
        raise ValueError(f"the last layer must have at most {CLASSES} outputs, got {width}")
