"""Perceptrons trained for many steps in one launch, by one program for each ticket.

Functions, not operators of torch.library: a launch moves the values and steps the optimizer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.groups import Groups
from .strategy import kernels, unsigned

BATCH = 128  # images at most of a batch
# Values and bias, each with its moments in Adam, and the pattern of the strategy "csr".
Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]


def fits(masks: Sequence[Tensor], batch: int) -> bool:
    """Whether tickets keep equally many weights, and so few that a step finds them in the cache of a multiprocessor.

    Args:
        masks: bool [R, N, K] of each layer.
    """
    kept = [mask.flatten(1).sum(1) for mask in masks]
    if not all((counts == counts[0]).all() for counts in kept):
        return False
    layers = [_sized(*mask.shape[1:], int(counts[0])) for mask, counts in zip(masks, kept, strict=True)]
    return kernels("ticket_trainer").fits(layers, batch)


def train(
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    scale: float,
    shift: float,
    layers: Sequence[Layer],
    step_count: int,
    rates: Tensor,
    loss: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Steps of Adam on uint8 `images` [n, P] * scale + shift, a batch of `indices` int64 [S, R, B] and one of `rates`
    float32 [S] each, in place, in one launch; `loss` float32 [R] grows by the mean loss of each.

    The moments have seen `step_count` steps. A ticket gets the same bits however steps are divided among launches.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    module = kernels("ticket_trainer")
    layers = [module.Layer(*tensors, Groups(*unsigned(pattern))) for *tensors, pattern in layers]
    given = images, labels, indices, scale, shift, layers, step_count, rates, loss
    module.train(*given, betas, eps, weight_decay)


def _sized(rows, columns, nnz):
    """A layer of that size, without memory."""
    sizes = *[nnz] * 3, *[rows] * 3, rows + 1, nnz, rows, columns + 1, nnz, columns, nnz
    tensors = [torch.empty(1, size, device="meta") for size in sizes]
    return kernels("ticket_trainer").Layer(*tensors[:6], Groups(*tensors[6:]))
