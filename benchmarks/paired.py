"""Timing closures against each other in one process: interleaved, so that a machine that drifts drifts for all."""

from collections.abc import Callable, Sequence
from math import comb
from statistics import median
from typing import NamedTuple

from .clocks import seconds_of


class Ratio(NamedTuple):
    """Median of pairwise ratios with its `interval`, over `n` pairs."""

    median: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        spread = f"n = {self.n}" if self.low is None else f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.median:.2f} ({spread})"


def seconds(steps: Sequence[Callable[[], object]], rounds: int, warmup: int = 3, inner: int = 1) -> list[list[float]]:
    """Seconds a step, each timed in turn and the device waited for; a row for each step.

    A timing is of `inner` steps in a row, after one that is not counted if they are several: more than one leaves in
    the caches what stays there in a training.
    """
    rows = []
    for _ in range(rounds + warmup):
        rows.append([])
        for step in steps:
            if inner > 1:
                step()
            rows[-1].append(seconds_of(step, inner))
    return [list(column) for column in zip(*rows[warmup:], strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Median of `values`, and the distribution-free interval that covers it with 95%; None for fewer than 6."""
    ordered, n = sorted(values), len(values)
    below = [sum(comb(n, i) for i in range(k)) / 2**n for k in range(1, n + 1)]
    outside = sum(2 * chance <= 0.05 for chance in below)  # values that can be left out on either side
    return median(ordered), *((ordered[outside - 1], ordered[-outside]) if outside else (None, None))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """How many times faster ours is, pair by pair."""
    return Ratio(*interval([a / b for a, b in zip(theirs, ours, strict=True)]), len(ours))
