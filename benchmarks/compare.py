"""From timings in turns to records: times, and ratios against what a user would otherwise pick."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median

import torch

from .clocks import Times, timed
from .paired import interval
from .providers import PRUNE, TUNED, Contestant, Unable
from .records import Record

TIME, OVER_TUNED, OVER_PRUNE = "time", "speed-up over dense tuned", f"speed-up over {PRUNE}"


@contextmanager
def computing(precision: str) -> Iterator[None]:
    """Float32 products inside are of full precision for fp32, in tf32 otherwise (where the device has it)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def cast(precision: str, device: torch.device):
    """The context of a forward: autocast for bf16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def precisions(wanted: tuple[str, ...], device: torch.device) -> tuple[str, ...]:
    return wanted if device.type == "cuda" else ("fp32",)


def failure(error: Exception) -> dict[str, str]:
    """Status and note of what an exception kept from being measured."""
    words = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, Unable):
        return {"status": "not runnable", "note": words}
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in words:
        return {"status": "out of memory", "note": words}
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("triton"):
        return {"status": "no Triton", "note": words}
    return {"status": "failed", "note": f"{type(error).__name__}: {words}"}


def contested(
    case: Record,
    contestants: dict[str, Contestant],
    make_step: Callable[[Contestant], Callable[[], object]],
    device: torch.device,
    allowance: float,
) -> Iterator[Record]:
    """The records of `case` for all contestants, timed in turns; what fails is recorded, and leaves the others."""
    steps = {}
    for name, contestant in contestants.items():
        try:
            steps[name] = make_step(contestant)
            steps[name]()
        except Exception as error:
            steps.pop(name, None)
            yield case._replace(provider=name, **failure(error))
    try:
        for clock, times in timed(steps, device, allowance) if steps else ():
            for record in compared(case._replace(clock=clock), times):
                yield record._replace(note=contestants[record.provider].note)
    except Exception as error:
        yield case._replace(provider="all together", **failure(error))


def compared(case: Record, times: Times) -> Iterator[Record]:
    """Of each provider the time and its ratios: tuned dense is the fastest of TUNED here."""
    tuned = min((name for name in TUNED if name in times), key=lambda name: median(times[name]), default=None)
    for name, seconds in times.items():
        ours = case._replace(provider=name)
        yield ours._replace(metric=TIME, unit="s", **summary(seconds))
        for metric, other in ((OVER_TUNED, tuned), (OVER_PRUNE, PRUNE)):
            if other in times and other != name:
                pairs = zip(times[other], seconds, strict=False)  # the hopelessly slow took fewer turns
                yield ours._replace(metric=metric, unit="times", **summary([theirs / own for theirs, own in pairs]))


def summary(values: list[float]) -> dict[str, float | int | None]:
    """Median of `values`, its `interval`, and their number, as a record has them."""
    found = dict(zip(("value", "low", "high"), interval(values), strict=True))
    return {name: value and float(f"{value:.5g}") for name, value in found.items()} | {"n": len(values)}
