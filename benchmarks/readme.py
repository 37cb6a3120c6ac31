"""Write the README's performance tables from the records in benchmarks/results/*/records.jsonl.

python benchmarks/readme.py
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from lth_sparse.benchmarks.clocks import CALL, COLD
from lth_sparse.benchmarks.compare import OVER_PRUNE
from lth_sparse.benchmarks.curves import Group, groups, winning
from lth_sparse.benchmarks.providers import CHOSEN, PRUNE
from lth_sparse.benchmarks.records import ROOT, Record, read
from lth_sparse.benchmarks.tables import faster, short, spread

from lth_sparse import runs

BEGIN, END = "<!-- made by benchmarks/readme.py -->", "<!-- end of what benchmarks/readme.py made -->"


def main(root: Path = ROOT) -> int:
    path = root / "README.md"
    runs.write_text(path, updated(path.read_text(encoding="utf-8"), root / "benchmarks" / "results"))
    return 0


def updated(text: str, results: Path) -> str:
    """A README with what stands between the markers made anew from the records in `results`.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks the lines {BEGIN} and {END}")
    measured = "\n\n".join(performance(read(path)) for path in sorted(results.glob("*/records.jsonl")))
    return f"{before}{BEGIN}\n\n{measured or 'Nothing has been recorded yet.'}\n\n{END}{after}"


def performance(records: list[Record]) -> str:
    """Of one file of records: a table of what `pack_` chose, and where it loses to dense."""
    shown = {group: lines for group, lines in groups(records).items() if CHOSEN in lines and _is_shown(group)}
    over_prune = groups(records, OVER_PRUNE)
    if not shown:
        return "No step of a packed layer has been timed."
    chosen = [record for lines in shown.values() for record in lines[CHOSEN]]
    densities = sorted({record.density for record in chosen}, reverse=True)
    some, counts = chosen[0], sorted(record.n for record in chosen)
    commit = f", commit {some.commit}" if some.commit else ""
    return "\n".join(
        [
            f"On {some.device} ({some.versions}{commit}), n = {counts[0]} to {counts[-1]} pairs:",
            "",
            f"| training step | against | {' | '.join(f'{density:.1%}' for density in densities)} |",
            f"|---|---|{'---:|' * len(densities)}",
            *(row for group, lines in shown.items() for row in _rows(group, lines, over_prune, densities)),
            "",
            *_losses(shown),
        ]
    )


def _is_shown(group):
    """Of layers on CUDA the time of the kernels, where their call time is that of Python."""
    return group.clock == (CALL if group.section == "networks" or "threads" in group.device else COLD)


def _rows(group: Group, lines, over_prune, densities) -> Iterator[str]:
    against = {"tuned dense": lines[CHOSEN], f"`{PRUNE}`": over_prune.get(group, {}).get(CHOSEN, [])}
    for place, (name, line) in enumerate(against.items()):
        cells = {record.density: f"{short(record.value)} ({spread(record)})" for record in line}
        title = "" if place else f"{group}, {group.precision}"
        yield f"| {title} | {name} | {' | '.join(cells.get(density, '-') for density in densities)} |"


def _losses(shown) -> Iterator[str]:
    for group, lines in shown.items():
        lost = [f"{record.density:.1%}" for record in lines[CHOSEN] if record.high is not None and record.high < 1]
        where = f"; surely slower at {', '.join(lost)}" if lost else ""
        yield f"- {group}, {group.precision}: {faster(winning(lines))}{where}."


if __name__ == "__main__":
    sys.exit(main())
