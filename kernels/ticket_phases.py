"""The phases of a training step of one ticket, each by all threads of the program that owns it.

`layer` is the layer's row in a table on the device (`ticket_trainer.py` fills it): addresses of tensors of all tickets,
and sizes. Activations are lines of `BATCH` samples, one for each feature; padding has finite activations and gradients
of 0. No phase loads what another thread stored in it: the barriers are between the phases.
"""

import triton
import triton.language as tl

from .loss import losses
from .optimizer import one_less_power

# A row of a layer: addresses, sizes, and where in a ticket's activations its input (but the first layer's) and output
# begin, in its gradients those of its values and its bias.
VALUES, BIAS, ROW_STARTS, COLUMNS, LONG_ROWS = (tl.constexpr(field) for field in range(5))
COLUMN_STARTS, ROWS_OF, LONG_COLUMNS, ORDER = (tl.constexpr(field) for field in range(5, 9))
N_ROWS, N_COLUMNS, NNZ = (tl.constexpr(field) for field in range(9, 12))
INPUT, OUTPUT, GRADIENT, BIAS_GRADIENT, LAYER_FIELDS = (tl.constexpr(field) for field in range(12, 17))
# A row of a parameter: the addresses of it and its moments, its size, and where in a ticket's gradients its own begins.
VALUE, FIRST, SECOND, SIZE, SLOPE, PARAMETER_FIELDS = (tl.constexpr(field) for field in range(6))
STEPS = tl.constexpr(4)  # weights of a row that are loaded before the first is needed


@triton.jit
def lines(layer, FIELD: tl.constexpr, activations):
    """Where the layer's input or output begins."""
    return activations + tl.multiple_of(tl.load(layer + FIELD), 64)


@triton.jit
def gather(images, indices, x, batch, pixels, PIXELS: tl.constexpr, BATCH: tl.constexpr):
    """Lines of the batch's bytes, [pixels, BATCH]; padding repeats the last image."""
    b = tl.arange(0, BATCH)
    image = tl.load(indices + tl.minimum(b, batch - 1)) * pixels
    for first in range(0, pixels, PIXELS):
        pixel = (first + tl.arange(0, PIXELS))[:, None]
        value = tl.load(images + image[None, :] + pixel, mask=pixel < pixels, other=0)
        tl.store(x + pixel * BATCH + b[None, :], value, mask=pixel < pixels)


@triton.jit
def forward(layer, ticket, x, y, scale, shift, relu, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """y = W (x * scale + shift) + bias, then ReLU if so said; scaled are the weights, not each sample."""
    b, n_rows, nnz = tl.arange(0, BATCH)[None, :], tl.load(layer + N_ROWS).to(tl.int32), tl.load(layer + NNZ)
    starts, long_rows = _pointer(layer, ROW_STARTS, tl.int32), _pointer(layer, LONG_ROWS, tl.int32)
    all_values = _pointer(layer, VALUES, tl.float32) + ticket * nnz
    all_columns = _pointer(layer, COLUMNS, tl.uint16) + ticket * nnz
    bias = _pointer(layer, BIAS, tl.float32) + ticket * n_rows
    for first in range(0, n_rows, ROWS):
        row, start, length = _lists(starts, long_rows, ticket, first, n_rows, ROWS)
        values, columns = all_values + start, all_columns + start
        sums = tl.zeros((ROWS, BATCH), tl.float32)
        for i in range(0, tl.max(length), STEPS):
            for j in tl.static_range(STEPS):
                value = tl.load(values + i + j, mask=i + j < length, other=0.0)
                column = tl.load(columns + i + j, mask=i + j < length, other=0).to(tl.int32)
                sums += (value * scale)[:, None] * tl.load(x + column[:, None] * BATCH + b).to(tl.float32)
        if shift != 0:
            sums += (_totals(values, length, ROWS) * shift)[:, None]
        sums += tl.load(bias + row)[:, None]
        sums = tl.where(relu & (sums < 0), 0.0, sums)
        tl.store(y + row[:, None] * BATCH + b, sums, mask=(first + tl.arange(0, ROWS) < n_rows)[:, None])


@triton.jit
def _totals(values, length, ROWS: tl.constexpr):
    """Sum of each row's weights. Carried through the loop of products, it would have every weight loaded twice."""
    total = tl.zeros((ROWS,), tl.float32)
    for i in range(0, tl.max(length), 16):
        at = i + tl.arange(0, 16)[None, :]
        total += tl.sum(tl.load(values[:, None] + at, mask=at < length[:, None], other=0.0), 1)
    return total


@triton.jit
def cross_entropy(logits, labels, indices, loss_sum, batch, classes, CLASSES: tl.constexpr, BATCH: tl.constexpr):
    """Logits [classes, BATCH] become the gradient of their mean cross-entropy, which is added to `loss_sum`."""
    b, column = tl.arange(0, BATCH), tl.arange(0, CLASSES)[None, :]
    at = logits + column * BATCH + b[:, None]
    label = tl.load(labels + tl.load(indices + tl.minimum(b, batch - 1)))
    row = tl.load(at, mask=column < classes, other=-float("inf"))
    loss, exponentials, total = losses(row, tl.max(row, 1), label, column)
    slope = (exponentials / total[:, None] - (column == label[:, None]).to(tl.float32)) / batch
    tl.store(loss_sum, tl.load(loss_sum) + tl.sum(tl.where(b < batch, loss, 0.0)) / batch)
    tl.debug_barrier()  # a tile smaller than the threads is loaded by several of them
    tl.store(at, tl.where((b < batch)[:, None], slope, 0.0), mask=column < classes)


@triton.jit
def weight_gradient(
    layer, ticket, dy, x, gradients, scale, shift,
    ROWS: tl.constexpr, WEIGHTS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Sums over the batch of dy (x * scale + shift), for the kept weights alone, and of dy."""
    b, n_rows, nnz = tl.arange(0, BATCH), tl.load(layer + N_ROWS).to(tl.int32), tl.load(layer + NNZ)
    starts, long_rows = _pointer(layer, ROW_STARTS, tl.int32), _pointer(layer, LONG_ROWS, tl.int32)
    columns = _pointer(layer, COLUMNS, tl.uint16) + ticket * nnz
    gradient, bias_gradient = gradients + tl.load(layer + GRADIENT), gradients + tl.load(layer + BIAS_GRADIENT)
    for first in range(0, n_rows, ROWS):
        row, start, length = _lists(starts, long_rows, ticket, first, n_rows, ROWS)
        dy_lines = tl.load(dy + row[:, None] * BATCH + b[None, :])
        total = tl.sum(dy_lines, 1)
        tl.store(bias_gradient + row, total, mask=first + tl.arange(0, ROWS) < n_rows)
        for i in range(0, tl.max(length), WEIGHTS):
            at = i + tl.arange(0, WEIGHTS)[None, :]
            inside, at = at < length[:, None], at + start[:, None]
            column = tl.load(columns + at, mask=inside, other=0).to(tl.int32)
            x_lines = tl.load(x + column[:, :, None] * BATCH + b[None, None, :]).to(tl.float32)
            sums = tl.sum(dy_lines[:, None, :] * x_lines, 2)
            tl.store(gradient + at, tl.fma(sums, scale, (total * shift)[:, None]), mask=inside)


@triton.jit
def input_gradient(layer, ticket, dy, x, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """The output x of a ReLU becomes the gradient by its input: W^T dy where it was above 0."""
    b, n_columns, nnz = tl.arange(0, BATCH)[None, :], tl.load(layer + N_COLUMNS).to(tl.int32), tl.load(layer + NNZ)
    starts, long_columns = _pointer(layer, COLUMN_STARTS, tl.int32), _pointer(layer, LONG_COLUMNS, tl.int32)
    values = _pointer(layer, VALUES, tl.float32) + ticket * nnz
    all_rows = _pointer(layer, ROWS_OF, tl.uint16) + ticket * nnz
    all_places = _pointer(layer, ORDER, tl.int32) + ticket * nnz
    for first in range(0, n_columns, ROWS):
        column, start, length = _lists(starts, long_columns, ticket, first, n_columns, ROWS)
        rows, places = all_rows + start, all_places + start
        sums = tl.zeros((ROWS, BATCH), tl.float32)
        for i in range(0, tl.max(length), STEPS):
            for j in tl.static_range(STEPS):
                place = tl.load(places + i + j, mask=i + j < length, other=0)
                value = tl.load(values + place, mask=i + j < length, other=0.0)
                row = tl.load(rows + i + j, mask=i + j < length, other=0).to(tl.int32)
                sums += value[:, None] * tl.load(dy + row[:, None] * BATCH + b)
        at, inside = x + column[:, None] * BATCH + b, (first + tl.arange(0, ROWS) < n_columns)[:, None]
        sums = tl.where(tl.load(at) > 0, sums, 0.0)
        tl.store(at, sums, mask=inside)


@triton.jit
def adam_scalars(lr, step, log_beta1, log_beta2):
    """Step size and root of the second moment's correction at a step counted from 1."""
    return tl.div_rn(lr, one_less_power(log_beta1, step)), tl.sqrt_rn(one_less_power(log_beta2, step))


@triton.jit
def adam(
    parameter, ticket, gradients, step_size, root, beta1, beta2, eps, weight_decay, BLOCK: tl.constexpr
):  # fmt: skip
    """Adam on the ticket's part of a parameter; formulas and their order are those of `optimizer.py`."""
    size = tl.load(parameter + SIZE).to(tl.int32)
    values = _pointer(parameter, VALUE, tl.float32) + ticket * size
    firsts = _pointer(parameter, FIRST, tl.float32) + ticket * size
    seconds = _pointer(parameter, SECOND, tl.float32) + ticket * size
    gradient = gradients + tl.load(parameter + SLOPE)
    for begin in range(0, size, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        inside = at < size
        value = tl.load(values + at, mask=inside, other=0.0)
        slope = tl.load(gradient + at, mask=inside, other=0.0) + weight_decay * value
        first = tl.fma(tl.load(firsts + at, mask=inside, other=0.0), beta1, (1 - beta1) * slope)
        second = tl.fma(tl.load(seconds + at, mask=inside, other=0.0), beta2, (1 - beta2) * (slope * slope))
        value -= tl.div_rn(step_size * first, tl.div_rn(tl.sqrt_rn(second), root) + eps)
        tl.store(firsts + at, first, mask=inside)
        tl.store(seconds + at, second, mask=inside)
        tl.store(values + at, value, mask=inside)


@triton.jit
def _pointer(row, FIELD: tl.constexpr, TYPE: tl.constexpr):
    return tl.load(row + FIELD).to(tl.pointer_type(TYPE))


@triton.jit
def _lists(starts, long_rows, ticket, first, count, ROWS: tl.constexpr):
    """Rows (or columns) from place `first` in the order of their lengths, where their weights start, and how many.

    Past the last they are that one again, without weights.
    """
    slot = first + tl.arange(0, ROWS)
    row = tl.load(long_rows + ticket * count + tl.minimum(slot, count - 1))
    starts += ticket * (count + 1) + row
    start = tl.load(starts)
    return row, start, tl.where(slot < count, tl.load(starts + 1) - start, 0)
