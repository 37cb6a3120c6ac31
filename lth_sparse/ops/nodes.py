"""What a training step does beside its layers: gathering images, the loss and its gradient, counting what is right.

Of R tickets at once, without autograd; on CUDA one launch each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .strategy import kernels, launches


def gather(images: Tensor, indices: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [R, B, C * P] = images[indices] * scale + shift, in `dtype`; on the CPU both may be None.

    Args:
        images: uint8 or float32 [n, C, P], contiguous.
        indices: int64 [R, B].
        scale, shift: float32 [C].
    """
    if launches(images):
        return kernels("batches").gather(images, indices, scale, shift, dtype)
    x = images.index_select(0, indices.flatten()).to(dtype)
    x = x if scale is None else x * scale[:, None] + shift[:, None]
    return x.view(*indices.shape, -1)


def cross_entropy(logits: Tensor, labels: Tensor, indices: Tensor, loss: Tensor) -> Tensor:
    """The gradient of each ticket's mean cross-entropy by its logits [R, B, C]; `loss` [R] grows by the means.

    Args:
        labels: int64 [n], of all images.
        indices: int64 [R, B], those of this batch.
    """
    if launches(logits):
        return kernels("loss").cross_entropy(logits, labels, indices, loss)
    wanted = labels.take(indices)[..., None]
    log = torch.log_softmax(logits, 2)
    loss.sub_(log.gather(2, wanted).mean((1, 2)))
    gradient = log.exp_()
    return gradient.scatter_add_(2, wanted, gradient.new_full((), -1.0).expand_as(wanted)).div_(logits.shape[1])


def tally(logits: Tensor, labels: Tensor, sums: Tensor) -> None:
    """Add the cross-entropy of `logits` [R, B, C], summed over the labels int64 [B], and the count of the right ones
    to `sums` float64 [R, 2]."""
    if launches(logits):
        kernels("loss").tally(logits, labels, sums)
        return
    wanted = labels.expand(logits.shape[:2])
    loss = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)
    sums += torch.stack([loss.sum(1), (logits.argmax(2) == wanted).sum(1)], 1)
