"""What an optimizer may do to masked weights, watched by torch's global step hooks.

Zero weight, zero gradient and zero moments stay zero under every elementwise optimizer, so nothing is done in
its step. Two cases are not like that: state from before a pruning, which would move pruned weights again, and
optimizers that mix entries (LBFGS, Muon), whose weights the next forward cleans.
"""

from torch import Tensor, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ELEMENTWISE = {
    *(optim.SGD, optim.ASGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Rprop, optim.Adagrad, optim.Adadelta),
}


def mark_clean(parameter: Tensor) -> None:
    """Note that `parameter` is zero off its mask as of this version; writers that autograd sees change the version."""
    if not parameter.is_inference():  # inference tensors have no version counter and cannot be trained
        parameter.clean_version = parameter._version


def is_clean(parameter: Tensor) -> bool:
    """Whether nothing that autograd sees has written `parameter` since `mark_clean`."""
    return parameter.is_inference() or getattr(parameter, "clean_version", None) == parameter._version


def mark_pruned(parameter: Tensor) -> None:
    """Have the state of the next optimizer that steps `parameter` checked once: it may be older than the mask."""
    parameter.pruned = True


def carry_state_(optimizer: optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Zero every state tensor of `parameter` (moments, momentum) off the new `mask`, so that nothing regrows."""
    for value in _state_tensors(optimizer, parameter):
        value.masked_fill_(~mask.to(value.device), 0)


def _state_tensors(optimizer, parameter):
    values = optimizer.state.get(parameter, {}).values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape and v.dim() > 0]


def _parameters(optimizer):
    return (p for group in optimizer.param_groups for p in group["params"])


def _refuse_stale_state(optimizer, args, kwargs):
    for parameter in _parameters(optimizer):
        if not getattr(parameter, "pruned", False):
            continue
        # Pruned weights are exactly zero, so state that moves a zero is state from before they were pruned.
        pruned = parameter.detach() == 0
        if any(v[pruned].count_nonzero() for v in _state_tensors(optimizer, parameter)):
            raise ValueError(
                f"{type(optimizer).__name__} holds state from before prune_ for a weight of shape "
                f"{tuple(parameter.shape)}: make a new optimizer or call prune_(..., optimizer=optimizer)"
            )
        parameter.pruned = False


def _keep_clean(optimizer, args, kwargs):
    if type(optimizer) in ELEMENTWISE:
        for parameter in _parameters(optimizer):
            if hasattr(parameter, "clean_version"):
                mark_clean(parameter)


register_optimizer_step_pre_hook(_refuse_stale_state)
register_optimizer_step_post_hook(_keep_clean)
