"""Cross-entropy of R tickets at once: its gradient for a step, and loss and correct answers for an evaluation.

A program owns a ticket and sums up its batch in an order that the shapes decide, so the bits are always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import DTYPES, NAMES

CLASSES = 1024  # at most: a row of logits lies in registers
BLOCK = 4096  # logits of a step, 16 a thread: with twice as many of either, some shape spills


@triton.jit
def losses(row, highest, label, column):
    """-log softmax(row)[label] of each row of a tile, and the exponentials and their sum that make the softmax."""
    exponentials = tl.exp(row - highest[:, None])
    total = tl.sum(exponentials, 1)
    chosen = tl.sum(tl.where(column == label[:, None], row, 0.0), 1)
    return tl.log(total) + (highest - chosen), exponentials, total


@triton.jit
def _cross_entropy_kernel(
    logits, labels, indices, loss_sum, gradient, batch, classes, ROWS: tl.constexpr, CLASSES: tl.constexpr
):  # fmt: skip
    ticket = tl.program_id(0).to(tl.int64)
    first, column = ticket * batch, tl.arange(0, CLASSES)[None, :]
    summed = tl.zeros((ROWS,), tl.float32)
    for start in range(0, batch, ROWS):
        b = start + tl.arange(0, ROWS)
        sample = first + tl.minimum(b, batch - 1)  # beyond the batch, its last row again: infinities would make NaN
        label = tl.load(labels + tl.load(indices + sample))
        at = sample[:, None] * classes + column
        row = tl.load(logits + at, mask=column < classes, other=-float("inf")).to(tl.float32)
        loss, exponentials, total = losses(row, tl.max(row, 1), label, column)
        summed += tl.where(b < batch, loss, 0.0)
        slope = (exponentials / total[:, None] - (column == label[:, None]).to(tl.float32)) / batch
        inside = (b < batch)[:, None] & (column < classes)
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    tl.store(loss_sum + ticket, tl.load(loss_sum + ticket) + tl.sum(summed) / batch)


@triton.jit
def _tally_kernel(logits, labels, sums, batch, classes, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    ticket = tl.program_id(0).to(tl.int64)
    first, column = ticket * batch, tl.arange(0, CLASSES)[None, :]
    summed, correct = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.int32)
    for start in range(0, batch, ROWS):
        b = start + tl.arange(0, ROWS)
        sample = tl.minimum(b, batch - 1)
        label = tl.load(labels + sample)
        at = (first + sample)[:, None] * classes + column
        row = tl.load(logits + at, mask=column < classes, other=-float("inf")).to(tl.float32)
        highest, best = tl.max(row, 1, return_indices=True)  # the first of equals
        loss, _, _ = losses(row, highest, label, column)
        summed += tl.where(b < batch, loss, 0.0)
        correct += ((b < batch) & (best == label)).to(tl.int32)
    sums += ticket * 2
    tl.store(sums, tl.load(sums) + tl.sum(summed))
    tl.store(sums + 1, tl.load(sums + 1) + tl.sum(correct))


def cross_entropy(logits: Tensor, labels: Tensor, indices: Tensor, loss_sum: Tensor) -> Tensor:
    """Gradient of each ticket's mean cross-entropy, (softmax - one-hot) / B; the mean is added to `loss_sum`.

    Args:
        logits: [R, B, C], C at most 1024, float32, bfloat16 or float16; what is not contiguous is copied.
        labels: int64 [n], of the whole data set, from 0 to C - 1, which nothing checks.
        indices: int64 [R, B], the labels of the batch: from 0 to n - 1, which nothing checks.
        loss_sum: float32 [R], contiguous; changed in place.

    Returns:
        dlogits [R, B, C] in the dtype of logits; computed in float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(logits, labels, loss_sum, logits.shape[:1], (torch.float32,))
    if indices.shape != logits.shape[:2] or indices.dtype != torch.int64 or indices.device != logits.device:
        form = f"{indices.dtype} {tuple(indices.shape)} on {indices.device}"
        raise ValueError(f"indices must be int64 {tuple(logits.shape[:2])} on {logits.device}, got {form}")
    tickets, batch, classes = logits.shape
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if gradient.numel():
        _cross_entropy_kernel[(tickets,)](
            logits.contiguous(), labels.contiguous(), indices.contiguous(), loss_sum, gradient, batch, classes,
            **_tile(batch, classes),
        )  # fmt: skip
    return gradient


def tally(logits: Tensor, labels: Tensor, sums: Tensor) -> None:
    """Add each ticket's summed cross-entropy and number of correct predictions to `sums`, in place.

    A prediction is the first of the largest logits, as torch's argmax.

    Args:
        logits: [R, B, C], C at most 1024, float32, bfloat16 or float16; what is not contiguous is copied.
        labels: int64 [B], the same for all tickets, from 0 to C - 1, which nothing checks.
        sums: [R, 2], contiguous, float64, or float32, which counts exactly to 2**24.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(logits, labels, sums, (*logits.shape[:1], 2), (torch.float64, torch.float32))
    tickets, batch, classes = logits.shape
    if labels.shape != (batch,):
        raise ValueError(f"labels must be [B] of logits {tuple(logits.shape)}, got {tuple(labels.shape)}")
    if logits.numel():
        _tally_kernel[(tickets,)](
            logits.contiguous(), labels.contiguous(), sums, batch, classes, **_tile(batch, classes)
        )


def _tile(batch: int, classes: int) -> dict[str, int]:
    """Rows and columns of a step, and the warps for them."""
    columns = max(16, triton.next_power_of_2(classes))
    rows = min(triton.next_power_of_2(batch), BLOCK // columns)
    return {"ROWS": rows, "CLASSES": columns, "num_warps": max(4, rows * columns // 512)}


def _check(logits, labels, sums, shape, dtypes):
    if logits.dim() != 3 or logits.shape[2] > CLASSES or logits.dtype not in DTYPES:
        wanted = f"{NAMES} [R, B, C], C at most {CLASSES}"
        raise ValueError(f"logits must be of {wanted}, got {logits.dtype} {tuple(logits.shape)}")
    if labels.dim() != 1 or labels.dtype != torch.int64 or labels.device != logits.device:
        form = f"{labels.dtype} {tuple(labels.shape)} on {labels.device}"
        raise ValueError(f"labels must be int64 [n] on {logits.device}, got {form}")
    fits = sums.shape == shape and sums.dtype in dtypes and sums.is_contiguous() and sums.device == logits.device
    if not fits:
        wanted = f"{' or '.join(str(d)[6:] for d in dtypes)} {tuple(shape)}, contiguous, on {logits.device}"
        form = f"{sums.dtype} {tuple(sums.shape)} of strides {sums.stride()} on {sums.device}"
        raise ValueError(f"the sums must be {wanted}, got {form}")
