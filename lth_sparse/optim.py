"""Adam, AdamW and SGD that step all float32 parameters of a group in one launch, shadows of packed layers included.

They are torch's optimizers, with torch's arguments and state dicts. On CUDA the launch takes every parameter that it
can; torch's fused step takes the rest: other devices and dtypes, amsgrad, maximize, tensors as betas or weight decay.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, optim

from .hooks import ELEMENTWISE
from .ops import optimizer as operators
from .ops.strategy import launches


def _alike(parameter, tensor):
    return tensor.stride() == parameter.stride() or tensor.squeeze().stride() == parameter.squeeze().stride()


def _is_dense(tensor):
    return tensor.is_contiguous() or torch.empty_like(tensor).stride() == tensor.stride()


def _like(parameter, tensor):
    """`tensor` in the memory order of `parameter`, which fused steps take for granted (torch's on the CPU unasked)."""
    return tensor if _alike(parameter, tensor) else torch.empty_like(parameter).copy_(tensor)


class _Plan(NamedTuple):
    """How a group is stepped while no tensor of it moves: the parameters taken, and their tables, one a device."""

    key: list
    taken: set[Tensor]
    tables: list


class _OneLaunch:
    """What the three share: torch's `step` asks `_init_group` for the tensors of a group, and never sees those taken.

    `refreshed` holds the parameters whose shadows the last step wrote, for the hook that refreshes all others.
    """

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **options | {"fused": True})
        self._forget()

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:  # they may come from an optimizer that is not fused
            group["fused"], group["foreach"] = True, None
        for parameter, values in self.state.items():
            for name, value in values.items():
                if name == "step":
                    values[name] = value.to(parameter.device, torch.float32)
                elif isinstance(value, Tensor):
                    values[name] = _like(parameter, value)
        self._forget()

    def _forget(self):
        self._step_supports_amp_scaling = False  # so GradScaler unscales the gradients itself
        self.plans, self.captured, self.kept, self.refreshed, self.columns = {}, [], {}, set(), {}

    def _accelerator_graph_capture_health_check(self):
        """Nothing here needs `capturable`: no step reads the device."""

    _cuda_graph_capture_health_check = _accelerator_graph_capture_health_check  # its name in torch 2.11

    def _kernel(self, group) -> Callable | None:
        """What steps a table of this group; None leaves the group to torch."""
        raise NotImplementedError

    def _fused(self, group, parameters, gradients, *state) -> None:
        """Step lists of tensors by torch's fused kernel, as torch would."""
        raise NotImplementedError

    def _init_group(self, group, *columns):
        if self._again(group):
            return False
        unusual = super()._init_group(group, *columns)  # complex or sparse
        self.refreshed.difference_update(group["params"])
        columns = [column for column in columns if column]
        if unusual or not columns:
            return unusual
        columns[1][:] = map(_like, *columns[:2])
        rows, kernel = list(zip(*columns, strict=True)), self._kernel(group)
        if kernel is None or not any(map(launches, columns[0])):
            for row in rows:
                self._refuse_other_strides(*row)
            alike = {(parameter.device.type, parameter.dtype) for parameter in columns[0]}
            if kernel and len(alike) == 1 and columns[0][0].is_cpu and all(None not in column for column in columns):
                states = [self.state[parameter] for parameter in columns[0]]
                self.columns[id(group)] = states, [list(column) for column in columns]
            return unusual
        taken = self._launch(group, rows, kernel)
        for at, column in enumerate(columns):
            column[:] = [row[at] for row in rows if row[0] not in taken]
        return unusual

    def again(self) -> bool:
        """Step as the last step did, but with the gradients of now and without torch's hooks, if nothing else changed.

        For parameters without shadows that torch's fused kernels step; others need `step`. Whether it did.
        """
        groups = self.param_groups
        if not self.columns or any(hasattr(parameter, "shadow") for group in groups for parameter in group["params"]):
            return False
        return all([self._again(group) for group in groups])

    def _again(self, group) -> bool:
        """Of the 260 us that Adam takes for LeNet-300-100 on the CPU this leaves 170, its kernel's 130 (torch 2.15)."""
        states, columns = self.columns.get(id(group), ((), None))
        if columns is None or len(columns[0]) != len(group["params"]):
            return False
        parameters, _, *rest = columns
        if self._kernel(group) is None or bool(group.get("momentum", rest)) != bool(rest):
            return False  # options that the columns were not made for
        gradients = [parameter.grad for parameter in parameters]
        for parameter, gradient, given, state in zip(parameters, gradients, group["params"], states, strict=True):
            same = parameter is given and self.state.get(given) is state and gradient is not None
            if not same or gradient.layout != torch.strided or gradient.stride() != parameter.stride():
                return False
        self._fused(group, parameters, gradients, *rest)
        return True

    def _refuse_other_strides(self, parameter, *others):
        tensors = [parameter, *(t for t in others if t is not None and t.shape == parameter.shape)]
        if not all(_alike(parameter, tensor) for tensor in tensors) or not _is_dense(parameter):
            raise ValueError(
                f"{type(self).__name__} steps dense parameters with moments alike in memory, got strides "
                f"{', '.join(str(tensor.stride()) for tensor in tensors)} for a shape of {tuple(parameter.shape)}"
            )

    def _launch(self, group, rows, kernel) -> set[Tensor]:
        """Step what the kernels can take of a group; the parameters taken."""
        plan = self._plan(group, rows)
        for table in plan.tables:
            kernel(table)
        torch.autograd.graph.increment_version(plan.taken)
        self.refreshed.update(plan.taken)
        return plan.taken

    def _plan(self, group, rows) -> _Plan:
        """The group's plan, made anew only when a tensor has moved, as gradients may after `zero_grad`."""
        key = [
            (p.shape, id(getattr(p, "shadow", 0)), *(t if t is None else t.data_ptr() for t in (p, *rest)))
            for p, *rest in rows
        ]
        plan = self.plans.get(id(group))
        if plan is None or plan.key != key:
            updates = [update for row in rows if (update := self._update(*row)) is not None]
            devices = {update[0].device for update in updates}
            tables = [operators.table([u for u in updates if u[0].device == device]) for device in devices]
            plan = self.plans[id(group)] = _Plan(key, {update[0] for update in updates}, tables)
            if "cuda" in {device.type for device in devices} and torch.cuda.is_current_stream_capturing():
                self.captured.append(plan)  # every replay copies the tables from the host again
        return plan

    def _update(self, parameter, gradient, *state) -> operators.Update | None:
        """What the kernels are given of a parameter, or None if they cannot take it."""
        self._refuse_other_strides(parameter, gradient, *state)
        if not launches(parameter) or any(tensor is None for tensor in state):
            return None
        shadow = kept = None
        if hasattr(parameter, "shadow"):
            shadow, pattern = parameter.shadow
            if self.kept.get(parameter, (None,))[0] is not parameter.shadow:
                columns = shadow.numel() // max(1, pattern.words.shape[:-1].numel())
                self.kept[parameter] = parameter.shadow, operators.kept_positions(pattern.words, columns)
            kept = self.kept[parameter][1]
        update = (parameter, gradient, *state, *[None] * (3 - len(state)), shadow, kept)
        return update if operators.fits(update) else None


class Adam(_OneLaunch, optim.Adam):
    """`torch.optim.Adam`, always fused: on CUDA one launch steps all float32 parameters and refreshes their shadows.

    Step counts lie on the device, and the learning rate may: a CUDA graph of the step follows a tensor, but keeps a
    number. Take one step before the capture, so that the graph does not begin by making moments of zeros.

    Raises:
        ValueError: on a step, a parameter that is not dense, or has moments of other strides.
    """

    def _kernel(self, group):
        if group["amsgrad"] or group["maximize"] or any(isinstance(beta, Tensor) for beta in group["betas"]):
            return None
        options = [group[name] for name in ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")]
        return lambda table: operators.adam_(table, *options)

    def _fused(self, group, parameters, gradients, firsts, seconds, steps):
        torch._foreach_add_(steps, 1)
        step = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
        (beta1, beta2), options = group["betas"], {name: group[name] for name in ("lr", "weight_decay", "eps")}
        options |= {"beta1": beta1, "beta2": beta2, "amsgrad": False, "maximize": False}
        step(parameters, gradients, firsts, seconds, [], steps, **options)


class AdamW(Adam, optim.AdamW):
    """`torch.optim.AdamW`, stepped as `Adam` is."""


class SGD(_OneLaunch, optim.SGD):
    """`torch.optim.SGD`, stepped as `Adam` is; with dampening the first step of a parameter is torch's own."""

    def _init_group(self, group, *columns):
        if group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                state = self.state[parameter] if parameter.grad is not None else {}
                if launches(parameter) and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
        return super()._init_group(group, *columns)

    def _kernel(self, group):
        if group["maximize"] or isinstance(group["weight_decay"], Tensor):
            return None
        options = [group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")]
        return lambda table: operators.sgd_(table, *options)

    def _fused(self, group, parameters, gradients, *momenta):
        names = ("weight_decay", "momentum", "lr", "dampening", "nesterov")
        options = {name: group[name] for name in names} | {"maximize": False, "is_first_step": False}
        torch._fused_sgd_(parameters, gradients, *(momenta or ([],)), **options)


ELEMENTWISE.update((Adam, AdamW, SGD))
