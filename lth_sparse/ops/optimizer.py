"""One launch for the step of an optimizer: many parameters, their moments and their shadows.

Functions, not operators of torch.library: a table holds addresses, and nothing is differentiated or traced here.
"""

from collections.abc import Sequence

from torch import Tensor

from .strategy import kernels

# Value, gradient, first and second moment, step, shadow and kept positions: an `Update` of the kernels.
Update = tuple[Tensor | None, ...]


def fits(update: Update) -> bool:
    """Whether the kernels can take the tensors of `update`: float32, dense and alike in memory, on one device."""
    module = kernels("table")
    return not module.unfit(module.Update(*update))


def table(updates: Sequence[Update]):
    """The addresses of `updates`, all on one device, in its memory; good until one of their tensors moves."""
    module = kernels("table")
    return module.table([module.Update(*update) for update in updates])


def adam_(table, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool):
    """One step of Adam (`decoupled`: of AdamW) on all that `table` holds, in one launch."""
    kernels("optimizer").adam_(table, lr, betas, eps, weight_decay, decoupled)


def sgd_(table, lr: float | Tensor, momentum: float, dampening: float, weight_decay: float, nesterov: bool):
    """One step of SGD on all that `table` holds, in one launch."""
    kernels("optimizer").sgd_(table, lr, momentum, dampening, weight_decay, nesterov)


def kept_positions(words: Tensor, columns: int) -> Tensor:
    """Where packed values lie in a contiguous shadow [R, N, `columns`]: int32, of the words [R, N, *] of a `Bitmap`."""
    return kernels("optimizer").kept_positions(words, columns)
