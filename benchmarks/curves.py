"""Speed-ups by density, as tables and figures show them, and the density below which sparse wins."""

import math
from typing import NamedTuple

from .compare import OVER_TUNED
from .providers import CHOSEN
from .records import Record


class Group(NamedTuple):
    """What the lines of one figure panel, or one table, have in common."""

    section: str
    name: str
    shape: str
    precision: str
    clock: str
    device: str

    def __str__(self) -> str:
        kind = self.name.removesuffix(" step")
        return f"{kind}, {self.shape}" if self.section == "networks" else f"{kind} {self.shape}"


def groups(records: list[Record], metric: str = OVER_TUNED) -> dict[Group, dict[str, list[Record]]]:
    """Records of whole steps by group and provider, dense first."""
    found: dict[Group, dict[str, list[Record]]] = {}
    for record in records:
        if record.metric == metric and record.value and record.density and record.name.endswith(" step"):
            group = Group(*(getattr(record, field) for field in Group._fields))
            found.setdefault(group, {}).setdefault(record.provider, []).append(record)
    for lines in found.values():
        for line in lines.values():
            line.sort(key=lambda record: -record.density)
    return found


def crossover(line: list[tuple[float, float]]) -> float | None:
    """The density below which every measured speed-up of `line`, (density, speed-up) pairs, is above 1.

    Between two densities it is interpolated in logarithms. None if the sparsest is no faster, infinite if all are.
    """
    before = None
    for density, speed in sorted(line):
        if speed <= 1:
            if before is None:
                return None
            sparser, faster = before
            share = math.log(faster) / math.log(faster / speed)
            return sparser * (density / sparser) ** share
        before = density, speed
    return math.inf if before else None


def winning(lines: dict[str, list[Record]], provider: str = CHOSEN) -> float | None:
    """The `crossover` of a provider in a group."""
    return crossover([(record.density, record.value) for record in lines.get(provider, [])])
