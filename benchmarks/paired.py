"""Timing closures against each other in one process: interleaved, so that a machine that drifts drifts for all."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Median of pairwise ratios with its distribution-free 95% interval, over `n` pairs."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(steps: Sequence[Callable[[], object]], rounds: int, warmup: int = 3, inner: int = 1) -> list[list[float]]:
    """Seconds a step, each timed in turn and the device waited for; a row for each step.

    A timing is of `inner` steps in a row, after one that is not counted if they are several: more than one leaves in
    the caches what stays there in a training.
    """
    rows = [[_seconds(step, inner) for step in steps] for _ in range(rounds + warmup)][warmup:]
    return [list(column) for column in zip(*rows, strict=True)]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Ratio:
    """How many times faster ours is, pair by pair; the interval is that of order statistics."""
    ordered = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    n, half = len(ordered), int(0.98 * len(ordered) ** 0.5)
    return Ratio(median(ordered), ordered[max(0, n // 2 - half)], ordered[min(n - 1, n // 2 + half)], n)


def _seconds(step, inner):
    if inner > 1:
        step()
    _synchronize()
    begin = time.perf_counter()
    for _ in range(inner):
        step()
    _synchronize()
    return (time.perf_counter() - begin) / inner


def _synchronize():
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
