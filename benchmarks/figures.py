"""Speed-up against percent of weights remaining, with the data of each figure as JSON beside it."""

import json
import math
from pathlib import Path

from lth_sparse import plots

from .curves import groups, winning
from .providers import CHOSEN, PRUNE
from .records import ROOT, Record
from .tables import faster

COLUMNS = 3
LINES = {  # colour and dashes of those whom the reader looks for; the others share what is left
    CHOSEN: (plots.PALETTE[1], "-"),
    "ours: masked": (plots.PALETTE[6], "-"),
    PRUNE: (plots.PALETTE[2], "--"),
    "dense, Adam": (plots.PALETTE[0], ":"),
    "dense, masked by hand": (plots.PALETTE[4], "--"),
}
ACCURACY = plots.PALETTE[3]
OTHERS = (plots.PALETTE[5], "#999999", "#8C564B", "#17BECF", "#BCBD22")


def draw(records: list[Record], folder: Path, results: Path = ROOT / "experiments" / "results") -> list[Path]:
    """Write a figure for each section, precision and clock, as .png, .svg and .json; returns their paths.

    Args:
        folder: made where there is none.
        results: summaries of experiments; the ticket's accuracy is drawn beside the speed of the same network.
    """
    import matplotlib.style

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.style.context(["default", plots.STYLE]):
        for name, data in figures_data(records, results).items():
            paths += plots.write(folder / name, figure(data), data)
    return paths


def figures_data(records: list[Record], results: Path) -> dict[str, dict]:
    """What `figure` draws, by the name of the figure."""
    found: dict[str, dict] = {}
    for group, lines in groups(records).items():
        name = f"{group.section}-{group.precision}-{group.clock.replace(', caches ', '-')}"
        some = next(iter(lines.values()))[0]
        head = {key: getattr(some, key) for key in ("device", "versions", "commit", "precision", "clock")}
        panel = {
            "title": str(group),
            "faster_below": winning(lines),
            "lines": {provider: [_point(record) for record in line] for provider, line in lines.items()},
            "accuracy": accuracy(group.name.removesuffix(" step"), results) if group.section == "networks" else None,
        }
        found.setdefault(name, head | {"panels": []})["panels"].append(panel)
    return found


def _point(record):
    return {key: getattr(record, key) for key in ("density", "value", "low", "high", "n", "note")}


def accuracy(network: str, results: Path) -> dict | None:
    """Density and test accuracy at early stop of the ticket of that network, from the first experiment that has one."""
    for path in sorted(results.glob("*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["settings"]["model"] == network:
            rows = [row for row in summary["rows"] if row["arm"] == "ticket" and row["test_accuracy"]["mean"]]
            points = [{"density": row["density"], "test_accuracy": row["test_accuracy"]["mean"]} for row in rows]
            return {"experiment": summary["name"], "dataset": summary["settings"]["dataset"], "points": points}
    return None


def figure(data: dict):
    """A panel for each shape: lines by provider with 95% intervals, dense at 1, and where the chosen one crosses it."""
    from matplotlib.figure import Figure

    panels = data["panels"]
    columns = min(COLUMNS, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    found = Figure(figsize=(5 * columns + 1, 3.8 * rows + 1.2), layout="constrained")
    found.suptitle(f"training step, {data['precision']}, {data['clock']}, on {data['device']}")
    styles, handles = _styles(panels), {}
    grid = list(found.subplots(rows, columns, squeeze=False).flat)
    for place, (panel, axes) in enumerate(zip(panels, grid, strict=False)):
        _draw_panel(axes, panel, styles)
        if place % columns == 0:
            axes.set_ylabel("times as fast as tuned dense")
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    found.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * columns + (columns == 1))
    return found


def _styles(panels):
    names = dict.fromkeys(name for panel in panels for name in panel["lines"])
    others = [name for name in names if name not in LINES]
    return LINES | {name: (OTHERS[place % len(OTHERS)], "-.") for place, name in enumerate(others)}


def _draw_panel(axes, panel, styles):
    from matplotlib.ticker import LogLocator

    axes.axhline(1, color="black", lw=1, zorder=2, label="dense, tuned")
    for name, points in panel["lines"].items():
        _draw_line(axes, name, points, *styles[name])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set(title=f"{panel['title']}\n{faster(panel['faster_below'])}", xlabel="percent of weights remaining")
    plots.percent_axis(axes, {100 * point["density"] for points in panel["lines"].values() for point in points})
    if panel["faster_below"] and panel["faster_below"] < 1:
        axes.axvline(100 * panel["faster_below"], color=LINES[CHOSEN][0], lw=1, ls=":", label="crossover of ours")
    if panel["accuracy"]:
        _draw_accuracy(axes, panel["accuracy"])


def _draw_line(axes, name, points, colour, dashes):
    x = [100 * point["density"] for point in points]
    bars = [[abs(point["value"] - (point[end] or point["value"])) for point in points] for end in ("low", "high")]
    width, size, order = (2.2, 4, 4) if name == CHOSEN else (1.2, 2.5, 3)
    style = {"color": colour, "ls": dashes, "lw": width, "ms": size, "zorder": order}
    values = [point["value"] for point in points]
    axes.errorbar(x, values, bars, marker="o", elinewidth=0.9, capsize=1.5, label=name, **style)


def _draw_accuracy(axes, accuracy):
    """On an axis of its own at the right, of two points or more."""
    low, high = sorted(axes.get_xlim())
    points = [(100 * point["density"], 100 * point["test_accuracy"]) for point in accuracy["points"]]
    points = [point for point in points if low <= point[0] <= high]
    if not points:
        return
    right = axes.twinx()
    right.plot(*zip(*points, strict=True), color=ACCURACY, marker="D", ms=2.5, lw=0.8)
    bottom, top = right.get_ylim()
    right.set_ylim(min(bottom, top - 2), top)
    right.set_ylabel(f"test accuracy of the ticket on {accuracy['dataset']} (%)", color=ACCURACY)
    right.tick_params(axis="y", colors=ACCURACY)
    right.grid(False)
