"""Whole networks: training steps per second and memory, by provider and density.

A step is forward, cross entropy, backward and Adam on random images and labels; every layer that the paper prunes keeps
the same share of its weights, at random. Logits are checked against float64 first; gradients are, layer by layer, in
`layers`.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from . import providers
from .compare import TIME, cast, computing, contested, failure, precisions
from .records import Record
from .shapes import NETWORKS, Level, network

TOLERANCES = {"fp32": 1e-3, "tf32": 3e-2, "bf16": 1e-1}  # of the logits, |found - wanted| / |wanted|
RATE, RESIDENT, PEAK = "training steps per second", "resident memory", "peak memory"


def section(level: Level, device: torch.device) -> Iterator[Record]:
    """All networks of a level, in one precision after the other."""
    absent = providers.absent(None, device)
    for precision in precisions(level.precisions, device):
        for name in level.networks:
            case = Record(name=f"{name} step", shape=f"batch {NETWORKS[name][1]}", precision=precision)
            for provider, (status, note) in absent.items():
                yield case._replace(provider=provider, status=status, note=note)
            with computing(precision):
                try:
                    yield from _network(case, name, level, device, absent)
                except Exception as error:
                    yield case._replace(**failure(error))


def _network(case, name, level, device, absent):
    torch.manual_seed(0)
    image, batch = NETWORKS[name]
    model = network(name).to(device)
    batch = torch.randn(batch, *image, device=device), torch.randint(10, (batch,), device=device)
    places = {
        name: torch.rand(layer.weight.shape, device=device)
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and name not in getattr(model, "kept_whole", ())
    }
    autocast = partial(cast, case.precision, device)
    checked = partial(_checked, absent=absent, model=model, places=places, images=batch[0], autocast=autocast)
    dense = yield from checked(case, providers.DENSE, density=1)
    for density in level.densities():
        here = case._replace(density=round(density, 4))
        contestants = dense | (yield from checked(here, providers.SPARSE, density=density))
        make_step = partial(_step, batch=batch, autocast=autocast)
        for record in contested(here, contestants, make_step, device, len(level.parts) * level.seconds):
            yield _rate(record) if record.metric == TIME else record
        for provider, contestant in contestants.items():
            yield from _memory(here._replace(provider=provider, note=contestant.note), contestant, make_step, device)


def _checked(case, makers, absent, model, places, density, images, autocast):
    """Yields a record for each provider that is not able, or wrong; returns the contestants that are right."""
    masks, right = {name: place < density for name, place in places.items()}, {}
    wanted = _reference(model, masks, images)
    for name in [name for name in makers if name not in absent]:
        try:
            found = makers[name](deepcopy(model), masks, images)
            with autocast():  # and with gradients, or torch.compile would compile twice
                logits = found.model(images).detach()
            error = float((logits - wanted).norm() / wanted.norm())
            if error <= TOLERANCES[case.precision]:
                right[name] = found
            else:
                yield case._replace(provider=name, status="wrong", note=f"logits off by {error:.1e}")
        except Exception as error:
            yield case._replace(provider=name, **failure(error))
    return right


@torch.no_grad()
def _reference(model, masks, images):
    model = deepcopy(model).double()
    for name, mask in masks.items():
        model.get_submodule(name).weight.mul_(mask)
    return model(images.double())


def _step(contestant, batch, autocast):
    """A closure that trains for one step."""
    (images, labels), (model, optimizer, *_) = batch, contestant

    def step():
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return step


def _rate(record):
    seconds = {"value": record.value, "low": record.high, "high": record.low}
    rates = {name: float(f"{1 / value:.5g}") if value else None for name, value in seconds.items()}
    return record._replace(metric=RATE, unit="1/s", **rates)


def _memory(case, contestant, make_step, device):
    """Bytes between steps, and on CUDA the most during one."""
    between = resident(contestant.model, contestant.optimizer)
    yield case._replace(metric=RESIDENT, unit="bytes", value=between, n=1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        make_step(contestant)()
        peak = torch.cuda.max_memory_allocated(device) - before + between
        yield case._replace(metric=PEAK, unit="bytes", value=peak, n=1)


def resident(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors that a model and its optimizer hold: parameters, gradients, moments, masks, structures."""
    found: dict[int, int] = {}
    held = [vars(module) for module in model.modules()] + [dict(optimizer.state)]
    while held:
        item = held.pop()
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
            held += [item.grad, *vars(item).values()] if item.is_leaf else []
        elif isinstance(item, dict):
            held += [*item.values()]
        elif isinstance(item, (list, tuple)):
            held += item
    return sum(found.values())
