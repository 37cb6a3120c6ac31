"""Timing closures in turns: the time of a call as its caller sees it, and on CUDA the time of its kernels.

Caches are hot: each timing follows an uncounted call of the same closure on the same buffers. Cold: a buffer of twice
the L2 cache has been written between.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

FEWEST, MOST = 7, 41  # timings of each; an interval of 95% needs six
HOPELESS, FEW = 4, 3  # times slower than the median one: timed in the first turns alone
SHORT = 0.002  # seconds that a timing should take, of several calls in a row if need be
CALL = "call, caches hot"
HOT, COLD = "kernels, caches hot", "kernels, caches cold"
Closures = dict[str, Callable[[], object]]
Times = dict[str, list[float]]


def timed(closures: Closures, device: torch.device, allowance: float) -> Iterator[tuple[str, Times]]:
    """Each clock's name, and the seconds of every closure by that clock, in the order of the turns.

    They must have been called before. Takes about `allowance` seconds, or longer if seven turns do; of hopelessly
    slow closures there are three timings.
    """
    probe = {name: min(seconds_of(closure), seconds_of(closure)) for name, closure in closures.items()}
    inner = min(20, 1 + int(SHORT / median(probe.values())))
    calls = 1 + inner + (7 if device.type == "cuda" else 0)
    usual = min(MOST, max(FEWEST, int(allowance / calls / sum(probe.values()))))
    turns = {name: FEW if taken > HOPELESS * median(probe.values()) else usual for name, taken in probe.items()}
    yield CALL, _by_turns(closures, turns, partial(_call_seconds, inner=inner))
    if device.type == "cuda":
        wait = 2 * median(probe.values())  # the launches of those far slower are bound by their kernels anyway
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        yield HOT, _by_turns(closures, turns, partial(_kernel_seconds, wait=wait))
        flush = torch.empty(size, dtype=torch.uint8, device=device)
        yield COLD, _by_turns(closures, turns, partial(_kernel_seconds, wait=wait, flush=flush))


def _by_turns(closures, turns, seconds) -> Times:
    times: Times = {name: [] for name in closures}
    for turn in range(max(turns.values())):
        for name, closure in closures.items():
            if turn < turns[name]:
                times[name].append(seconds(closure))
    return times


def _call_seconds(closure, inner):
    closure()
    return seconds_of(closure, inner)


def seconds_of(closure: Callable[[], object], inner: int = 1) -> float:
    """Mean of `inner` calls in a row, the device waited for before and after."""
    synchronize()
    begin = time.perf_counter()
    for _ in range(inner):
        closure()
    synchronize()
    return (time.perf_counter() - begin) / inner


def synchronize() -> None:
    """Wait for CUDA, where it is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _kernel_seconds(closure, wait, flush=None):
    """Between two events, behind a kernel that waits until the queue is full, so that no gap of launches is counted."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if flush is None:
        closure()
    else:
        flush.fill_(1)
    torch.cuda._sleep(int(2e9 * wait))  # cycles, at 2 GHz or less
    begin.record()
    closure()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000
