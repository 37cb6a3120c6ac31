"""What an optimizer may do to masked weights, watched by torch's global step hooks.

Zero weight, zero gradient and zero moments stay zero under every elementwise optimizer, so nothing is done in
its step. Two cases are not like that: state from before a pruning, which would move pruned weights again and is
refused, and optimizers that mix entries (LBFGS, Muon) or that torch does not know, whose weights are zeroed off
the mask after each step.
"""

import weakref

import torch
from torch import Tensor, optim
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import ops

ELEMENTWISE = {
    *(optim.SGD, optim.ASGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Rprop, optim.Adagrad, optim.Adadelta),
}


def adopt(parameter: Tensor, mask: Tensor) -> None:
    """Make `parameter` one of ours: to be zeroed in place off the bool `mask`, by the next to look.

    Parameters of the model only: tensors handed in for one call (functional_call) are never written. Inference
    tensors cannot be trained, and have no version counter to tell whether they were written.
    """
    if not parameter.is_inference():
        parameter.mask, parameter.clean_version = mask, None


def disown(parameter: Tensor) -> None:
    """Undo `adopt`: `parameter` is that of an ordinary layer again, free to be non-zero anywhere."""
    for name in ("mask", "clean_version", "pruned", "leaks"):
        parameter.__dict__.pop(name, None)


def is_ours(parameter: Tensor) -> bool:
    """Whether `parameter` was adopted."""
    return hasattr(parameter, "clean_version")


def is_clean(parameter: Tensor) -> bool:
    """Whether nothing that autograd sees has written `parameter` since `clean_`; such writers change its version."""
    return parameter.clean_version == parameter._version


@torch.no_grad()
def clean_(parameter: Tensor, mask: Tensor) -> None:
    """Adopt `parameter` and zero it off the bool `mask`, in place."""
    parameter.masked_fill_(~mask, 0)
    adopt(parameter, mask)
    if is_ours(parameter):
        parameter.clean_version = parameter._version


def mark_pruned(parameter: Tensor) -> None:
    """Have the next gradient of `parameter`, and the state of the next optimizer that steps it, checked once.

    The state may be older than the mask. A gradient that is not zero off it reached the weight past its layer: from
    then on it is masked as it arrives, before anybody can clip, average or log it.
    """
    parameter.pruned, parameter.leaks = True, None
    watched = any(isinstance(hook, _Watch) for hook in (parameter._backward_hooks or {}).values())
    if parameter.requires_grad and not parameter.is_inference() and not watched:
        _Watch(parameter)


class _Watch:
    """A gradient hook that goes away where it finds nothing to mask, and leaves a training step as fast as without."""

    def __init__(self, parameter: Tensor):
        self.parameter, self.handle = weakref.ref(parameter), parameter.register_hook(self)

    def __call__(self, gradient):
        parameter = self.parameter()
        if not hasattr(parameter, "mask"):  # disowned
            return self.handle.remove()
        off = ~parameter.mask.to(gradient.device)
        if parameter.leaks is None and not (gradient.is_cuda and torch.cuda.is_current_stream_capturing()):
            parameter.leaks = bool(gradient[off].any())
        return self.handle.remove() if parameter.leaks is False else gradient.masked_fill(off, 0)


def carry_state_(optimizer: optim.Optimizer, parameter: Tensor, mask: Tensor) -> None:
    """Zero every state tensor of `parameter` (moments, momentum) off the new `mask`, so that nothing regrows."""
    for value in _state_tensors(optimizer, parameter):
        value.masked_fill_(~mask.to(value.device), 0)


def _state_tensors(optimizer, parameter):
    values = optimizer.state.get(parameter, {}).values()
    return [v for v in values if isinstance(v, Tensor) and v.shape == parameter.shape and v.dim() > 0]


def _ours(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"] if is_ours(p)]


def _refuse_stale_state(optimizer, parameter):
    if float(optimizer.state.get(parameter, {}).get("step", 1)) == 0:  # Adagrad has non-zero state before any step
        return
    for value in _state_tensors(optimizer, parameter):
        if value[~parameter.mask.to(value.device)].any():
            raise ValueError(
                f"{type(optimizer).__name__} holds state from before prune_ for a weight of shape "
                f"{tuple(parameter.shape)}: make a new optimizer or call prune_(..., optimizer=optimizer)"
            )


def _leaks(parameter):
    """Whether something moves the gradients of pruned weights after they arrived, such as noise.

    Looked at once for each mask, as looking at every step would cost 3.6% (LeNet-300-100, fused Adam, one core).
    """
    return parameter.grad is not None and bool(parameter.grad[~parameter.mask.to(parameter.device)].any())


def replace(parameter: Tensor) -> None:
    """Have optimizers that still hold `parameter` refused: `pack_`, `unpack_` or `remove_units_` has replaced it."""
    parameter.replaced = True


def require_elementwise(parameter: Tensor) -> None:
    """Have optimizers refused that are not known to be elementwise: `parameter` holds packed values."""
    parameter.elementwise = True


def attach_shadow(parameter: Tensor, shadow: Tensor, pattern: tuple[Tensor, ...]) -> None:
    """Have `shadow`, the dense form of the packed values `parameter`, refreshed after each optimizer step."""
    parameter.shadow = (shadow, ops.Bitmap(*pattern[-2:]))


def _refuse_unfit(optimizer, parameter):
    if getattr(parameter, "replaced", False):
        raise ValueError(
            f"{type(optimizer).__name__} holds a weight that pack_, unpack_ or remove_units_ has replaced: "
            "make a new optimizer"
        )
    if getattr(parameter, "elementwise", False) and type(optimizer) not in ELEMENTWISE:
        raise ValueError(
            f"{type(optimizer).__name__} is not known to be elementwise, which packed values need: use one of "
            f"{', '.join(sorted({kind.__name__ for kind in ELEMENTWISE}))}, or call unpack_(model)"
        )


def _before_step(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _refuse_unfit(optimizer, parameter)
    for parameter in _ours(optimizer):
        if not is_clean(parameter):
            clean_(parameter, parameter.mask.to(parameter.device))
        if getattr(parameter, "pruned", False):
            _refuse_stale_state(optimizer, parameter)
            parameter.pruned, parameter.leaks = False, parameter.leaks or _leaks(parameter)
        if getattr(parameter, "leaks", False) and parameter.grad is not None:
            parameter.grad.masked_fill_(~parameter.mask.to(parameter.device), 0)


def _after_step(optimizer, args, kwargs):
    refreshed = getattr(optimizer, "refreshed", ())  # by the optimizer's own launch
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if hasattr(parameter, "shadow") and parameter not in refreshed:
                shadow, pattern = parameter.shadow
                ops.refresh_(shadow, parameter.detach(), pattern)
    for parameter in _ours(optimizer):
        if type(optimizer) in ELEMENTWISE:
            parameter.clean_version = parameter._version
        else:
            clean_(parameter, parameter.mask.to(parameter.device))


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
