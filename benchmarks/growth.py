"""How the time of a step grows: with the tickets that train together, and with the width of the network.

Random images and labels in the shapes of MNIST, batch 60, Adam, 20% of the weights kept. Rounds are in `experiments`.
"""

import time
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

import lth_sparse as lth
from lth_sparse import training
from lth_sparse.data import Data, Split
from lth_sparse.recipe import Recipe

from .paired import ratio
from .records import Record
from .shapes import Level

DENSITY, BATCH = 0.2, 60
STEPS = 100
ROUNDS = 7


def section(level: Level, device: torch.device) -> Iterator[Record]:
    """Time of a ticket's step against the tickets, then against the width."""
    images = _images(device)
    case = Record(name="step of a perceptron 784-300-100-10", density=DENSITY, precision="fp32", provider="lth")
    yield from _grown(case, {f"{count} tickets": (count, 300) for count in level.tickets}, images, device)
    case = case._replace(name="step of a perceptron 784-width-100-10")
    yield from _grown(case, {f"width {width}": (1, width) for width in level.widths}, images, device)


def _grown(case, sizes, images, device) -> Iterator[Record]:
    """Seconds of a ticket's step by size, all sizes in turn, and how many times those of the first."""
    taken: dict[str, list[float]] = {shape: [] for shape in sizes}
    for round in range(ROUNDS + 1):  # the first compiles, and is not counted
        for shape, (count, width) in sizes.items():
            seconds = _seconds(count, width, images, device)
            taken[shape] += [seconds / count / STEPS] if round else []
    first = next(iter(taken.values()), [])
    for shape, seconds in taken.items():
        here, grown = case._replace(shape=shape, n=ROUNDS), ratio(seconds, first)
        yield here._replace(
            metric="step of a ticket", unit="s", value=median(seconds), low=min(seconds), high=max(seconds)
        )
        numbers = {"value": grown.median, "low": grown.low, "high": grown.high}
        yield here._replace(metric=f"times the step of {next(iter(taken))}", **numbers)


def _seconds(count, width, images, device) -> float:
    """Seconds to train `count` tickets for STEPS steps."""
    tickets = []
    for seed in range(count):
        torch.manual_seed(seed)
        layers = nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 100), nn.ReLU(), nn.Linear(100, 10)
        model = lth.prune_(lth.sparsify_(nn.Sequential(nn.Flatten(), *layers)), 1 - DENSITY)
        tickets.append(training.Ticket(model.to(device), f"ticket {seed}", seed))
    steps = {"iterations": str(STEPS), "evaluate_every": str(STEPS), "strategy": "masked"}
    recipe = Recipe(device=device.type, batch_size=BATCH, threads=1, **steps).resolve(len(images.train.labels))
    begin = time.perf_counter()
    training.train(tickets, images, recipe)
    return time.perf_counter() - begin


def _images(device) -> Data:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (600, 1, 28, 28), dtype=torch.uint8, generator=generator)
    train = Split(levels.to(device), torch.randint(10, (600,), generator=generator).to(device))
    few = Split(*(tensor[:60] for tensor in train))
    scale, shift = torch.full((1,), 1 / 255, device=device), torch.zeros(1, device=device)
    return Data("random", train, few, few, (1, 28, 28), 10, "unit", scale, shift)
