"""Records as tables for the terminal: speed-up over dense tuned by density, and what could not be measured."""

import math
from collections.abc import Iterator

from rich.table import Column, Table

from .curves import groups, winning
from .records import Record

COLUMNS = 7  # densities that a terminal has room for


def tables(records: list[Record]) -> Iterator[Table | str]:
    """A table for each shape, precision and clock, then a line for each reason that something is missing."""
    for group, lines in groups(records).items():
        densities = sorted({record.density for line in lines.values() for record in line}, reverse=True)
        densities = densities[:: math.ceil(len(densities) / COLUMNS)]
        columns = [f"{density:.1%}" for density in densities]
        yield f"{group} ({group.precision}; {group.clock}): ours {faster(winning(lines))}"
        table = Table(Column("over dense tuned", overflow="fold"), *columns, box=None)
        for provider, line in lines.items():
            cells = {record.density: f"{short(record.value)}\n{spread(record)}" for record in line}
            table.add_row(provider, *(cells.get(density, "-") for density in densities))
        yield table
    missing: dict[tuple[str, str, str], None] = {}
    for record in records:
        if record.status != "ok":
            missing[record.provider or record.section, record.status, record.note] = None
    for provider, status, note in missing:
        yield f"{provider}: {status}: {note}"


def spread(record: Record) -> str:
    """The interval, or where there is none the number of timings."""
    return f"n={record.n}" if record.low is None else f"{short(record.low)}-{short(record.high)}"


def short(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.1f}"


def faster(crossover: float | None) -> str:
    """The crossover in words."""
    if crossover is None:
        return "never faster than dense"
    where = "at every density" if crossover > 1 else f"below {crossover:.1%} of the weights"
    return f"faster than dense {where}"
