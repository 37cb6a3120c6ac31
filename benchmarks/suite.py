"""The suite: sections in turn, each a function `(level, device) -> Iterator[Record]`, within the minutes of the level.

Whatever happens to a section, the records so far are kept, and one more says why the rest is missing.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import experiments, figures, growth, layers, networks
from .compare import failure
from .records import Record, origin, title, write
from .shapes import LEVELS, Level

Section = Callable[[Level, torch.device], Iterator[Record]]
SECTIONS: dict[str, Section] = {
    "growth": growth.section,
    "experiments": experiments.section,
    "networks": networks.section,
    "layers": layers.section,
}
SAVE_SECONDS = 5.0  # at most this much measuring is lost to a kill


def bench(level: str, device: str, out: Path, on_record: Callable[[Record], None]) -> list[Record]:
    """`run` one of LEVELS on "cpu" or "cuda", and draw its figures.

    Raises:
        ValueError: "cuda" where torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device to run the benchmarks on: leave out --device cuda")
    found = run(LEVELS[level], torch.device(device), out, SECTIONS, on_record)
    figures.draw(found, out)
    return found


def verdict(records: list[Record]) -> int:
    """The exit code: 130 if interrupted, 1 if a result was wrong, else 0, whatever could not be measured."""
    statuses = {record.status for record in records}
    return 130 if "interrupted" in statuses else int("wrong" in statuses)


def run(
    level: Level,
    device: torch.device,
    out: Path,
    sections: dict[str, Section],
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Measure a level on a device; returns the records, which are in `out`/records.jsonl too.

    Interrupted, it returns what it has; the last record then has the status "interrupted".

    Args:
        out: a folder, made where there is none; its records are replaced.
        on_record: called with each record as it comes.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)  # or moments that decay to nothing would slow down those who have most of them
    torch.backends.cudnn.benchmark = True  # the best that cuDNN has, for everybody
    found: list[Record] = []
    said, saved = origin(device), time.monotonic()
    try:
        for record in _records(level, device, sections):
            found.append(record._replace(**said))
            on_record(found[-1])
            if time.monotonic() - saved > SAVE_SECONDS:
                write(out / "records.jsonl", found)
                saved = time.monotonic()
    except KeyboardInterrupt:
        section = found[-1].section if found else next(iter(sections))
        found.append(Record(section, status="interrupted", note="stopped here", **said))
    write(out / "records.jsonl", found)
    return found


def _records(level, device, sections):
    """Each section has an equal share of the minutes that the ones before it left."""
    end = time.monotonic() + 60 * level.minutes
    for place, (name, section) in enumerate(sections.items()):
        now = time.monotonic()
        until = now + (end - now) / (len(sections) - place)
        try:
            yield from _until(until, section(level, device), name)
        except Exception as error:
            yield Record(name, **failure(error))


def _until(end, records, section):
    last = None
    for record in records:
        if last is not None and time.monotonic() > end and title(record) != title(last):
            yield Record(section, status="out of time", note=f"stopped after {title(last)}")
            return
        yield record._replace(section=section)
        last = record
