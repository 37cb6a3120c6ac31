"""Single layers: forward, input gradient, weight gradient, optimizer and whole step, by every provider and density.

Data, weights and masks are random, and the masks nested. Before a provider is timed, its forward and all its gradients
at that very shape are checked against float64; one that is wrong has no times.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import providers
from .compare import cast, computing, contested, failure, precisions
from .records import Record
from .shapes import Level, Shape

TOLERANCES = {"fp32": 3e-5, "tf32": 3e-3, "bf16": 2e-2}  # |found - wanted| / |wanted|


class Task(NamedTuple):
    """A batch for a layer, the gradient of its output, and the context that a forward runs in."""

    x: Tensor
    dy: Tensor
    autocast: Callable

    def forward(self, model: nn.Module, x: Tensor | None = None) -> Tensor:
        with self.autocast():
            return model(self.x if x is None else x)

    def fed_to(self, model: nn.Module) -> "Task":
        """The same in the memory order in which `model` returns images, as a neighbour like it would hand them over."""
        y = self.forward(model)
        if y.dim() < 4 or y.is_contiguous():
            return self
        x, dy = (tensor.detach().contiguous(memory_format=torch.channels_last) for tensor in (self.x, self.dy))
        return self._replace(x=x.requires_grad_(), dy=dy)


def section(level: Level, device: torch.device) -> Iterator[Record]:
    """All layers of a level, in one precision after the other."""
    shapes = yield from _shapes(level)
    for precision in precisions(level.precisions, device):
        for shape in shapes:
            case = Record(name=f"{shape.kind} step", shape=str(shape), precision=precision)
            absent = providers.absent(shape.kind, device)
            for name, (status, note) in absent.items():
                yield case._replace(provider=name, status=status, note=note)
            with computing(precision):
                try:
                    yield from _layer(case, shape, level, device, absent)
                except Exception as error:
                    yield case._replace(**failure(error))


def _shapes(level):
    """Yields a record for each network that cannot be had here; returns the layers, each once."""
    found = level.linears()
    for name in level.convolutions:
        try:
            found += level.convolved(name)
        except Exception as error:
            yield Record(name=f"convolutions of {name}", **failure(error))
    return list(dict.fromkeys(found))


def training_step(shape: Shape, provider: str, density: float, device: torch.device) -> tuple[Callable, str]:
    """A closure that trains a layer for one step in float32, and which strategy of ours computes it ("" if none)."""
    layer, task, places = _drawn(shape, "fp32", device)
    makers = providers.DENSE | providers.sparse(shape.kind)
    found = makers[provider](layer, {"": places < density}, task.x)
    return _closure(task, "step", found), found.note


def _drawn(shape, precision, device):
    """A layer, its task, and the places of its weights: a mask of some density keeps those below it."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    layer, x = shape.layer().to(device), torch.randn(shape.input, device=device)
    dy = torch.randn_like(layer(x).detach()).to(dtype)
    task = Task(x.to(dtype).requires_grad_(), dy, partial(cast, precision, device))
    return layer, task, torch.rand(layer.weight.shape, device=device)


def _layer(case, shape, level, device, absent):
    layer, task, places = _drawn(shape, case.precision, device)
    dense = yield from _checked(case, providers.DENSE, absent, layer, places < 1, task)
    for density in level.densities():
        here, mask = case._replace(density=round(density, 4)), places < density
        yield from _at_density(here, shape.kind, absent, layer, mask, task, dense, level)


def _at_density(case, kind, absent, layer, mask, task, dense, level):
    sparse = yield from _checked(case, providers.sparse(kind), absent, layer, mask, task)
    for part in level.parts:
        named = case._replace(name=f"{kind} {part}")
        able = dense | sparse
        for name in [name for name, found in able.items() if part not in found.parts]:
            yield named._replace(provider=name, status="not runnable", note=able.pop(name).lacks)
        yield from contested(named, able, partial(_closure, task, part), mask.device, level.seconds)


def _checked(case, makers, absent, layer, mask, task):
    """Yields a record for each provider that is not able, or wrong; returns the contestants that are right."""
    wanted, right = cache(partial(_reference, layer, task)), {}
    for name in [name for name in makers if name not in absent]:
        try:
            found = makers[name](deepcopy(layer), {"": mask}, task.x)
            if fault := _fault(found, task, wanted(found.mask), TOLERANCES[case.precision]):
                yield case._replace(provider=name, status="wrong", note=fault)
                continue
            right[name] = found
        except Exception as error:
            yield case._replace(provider=name, **failure(error))
    return {name: right[name] for name in makers if name in right}


def _reference(layer, task, mask):
    """Output and gradients in float64 of the layer with that mask."""
    layer, x = deepcopy(layer).double(), task.x.detach().double().requires_grad_()
    if mask is not None:
        layer.weight.data.mul_(mask)
    y = layer(x)
    y.backward(task.dy.double())
    return _results(layer, y, x, mask)


def _results(model, y, x, mask):
    """What is checked, by name; of the weight gradient what is kept, in the order of packed values."""
    found = {"forward": y.detach()}
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            found["bias gradient"] = parameter.grad
        elif parameter.dim() == 1:
            found["weight gradient"] = parameter.grad
        else:
            rows = parameter.grad.movedim(1, -1)  # a convolution's channels last
            found["weight gradient"] = rows.flatten() if mask is None else rows[mask.movedim(1, -1)]
    return found if x.grad is None else found | {"input gradient": x.grad}


def _fault(contestant, task, wanted, tolerance):
    """Which results are wrong and by how much, or ""."""
    task = task.fed_to(contestant.model)
    task.x.grad = None
    y = task.forward(contestant.model)
    if y.requires_grad:
        y.backward(task.dy)
    found = _results(contestant.model, y, task.x, contestant.mask)
    if contestant.optimizer is not None:
        contestant.optimizer.zero_grad()
    errors = {}
    for name, value in (wanted if y.requires_grad else {"forward": wanted["forward"]}).items():
        error = (found[name] - value).norm() if name in found else torch.inf
        if not error <= tolerance * value.norm():
            errors[name] = float(error / value.norm())
    return ", ".join(f"{name} off by {error:.1e}" for name, error in errors.items())


def _closure(task, part, contestant):
    """A closure that computes one part of a training step."""
    return CLOSURES[part](contestant, task.fed_to(contestant.model))


def _forward(contestant, task):
    return lambda: task.forward(contestant.model)


def _input_gradient(contestant, task):
    parameters = list(contestant.model.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    y = task.forward(contestant.model)
    for parameter in parameters:
        parameter.requires_grad_()
    return lambda: torch.autograd.grad(y, task.x, task.dy, retain_graph=True)


def _weight_gradient(contestant, task):
    parameters = list(contestant.model.parameters())
    y = task.forward(contestant.model, task.x.detach())
    return lambda: torch.autograd.grad(y, parameters, task.dy, retain_graph=True)


def _optimizer(contestant, task):
    _step(contestant, task)()
    return contestant.optimizer.step


def _step(contestant, task):
    model, optimizer, x = contestant.model, contestant.optimizer, task.x

    def step():
        x.grad = None
        optimizer.zero_grad()
        task.forward(model).backward(task.dy)
        optimizer.step()

    return step


CLOSURES: dict[str, Callable] = dict(
    zip(providers.PARTS, (_forward, _input_gradient, _weight_gradient, _optimizer, _step), strict=True)
)
