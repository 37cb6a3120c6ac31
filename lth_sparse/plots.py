"""The paper's figures of a run, each drawn from the very numbers that are written as JSON beside it."""

import math
import os
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np

from .runs import write_json

# Okabe & Ito, which colour-blind readers can tell apart; without their yellow, too pale on white.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ARMS = {  # colour, marker, and the dashes that tell arms apart where the colour says the round
    "ticket": (PALETTE[1], "o", "-"),
    "reinit": (PALETTE[2], "s", "--"),
    "reinit-chain": (PALETTE[4], "^", "-."),
    "random": (PALETTE[3], "D", ":"),
}
MARKERS, DASHES = "osD^vP*", ("-", "--", ":", "-.")
PANELS = {  # of the figure `tickets`: what is drawn, its title, what to multiply it with
    "early_stop_iteration": ("early-stop iteration", 1),
    "test_accuracy": ("test accuracy at early stop (%)", 100),
    "final_test_accuracy": ("test accuracy at end of training (%)", 100),
}
SHOWN = 4  # arms at most in the figure of curves, where each has two lines or more
PAPER_PERCENT = (100, 51.3, 21.1, 7.0, 3.6, 1.9, 0.2)  # rounds 0, 3, 7, 12, 15, 18, 28 of LeNet
STATISTICS = ("mean", "min", "max")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.hashsalt": "lth_sparse",  # else the ids in an SVG differ from time to time
}


def draw(summary: dict, curves: dict, folder: Path) -> list[Path]:
    """Write what the data allow of `tickets` and `accuracy`, each as .png, .svg and .json; returns their paths.

    Args:
        summary: name, identity, settings, and rows: one per arm and round; what is missing is None or NaN.
        curves: {arm: {round: {"density", "iteration": [n], "test_accuracy": {"mean": [n], "min", "max"}}}}.
        folder: made where there is none.
    """
    import matplotlib.style

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        if data := tickets_data(summary):
            paths += write(folder / "tickets", tickets_figure(data), data)
        if data := accuracy_data(summary, curves):
            paths += write(folder / "accuracy", accuracy_figure(data), data)
    return paths


def tickets_data(summary: dict) -> dict | None:
    """What `tickets_figure` draws: the rows, with the quantities of its panels. None where there are no rows."""
    keys = ("arm", "round", "density", "n", *PANELS)
    rows = [{key: row.get(key) for key in keys} for row in summary["rows"] if row["density"]]
    return _head(summary, rows) | {"rows": rows} if rows else None


def tickets_figure(data: dict):
    """Early stop and accuracies against percent of weights remaining, one line per arm.

    Frankle & Carbin 2019, Figures 1 and 4; bars from min to max over trials where there are several.
    """
    figure, panels = _panels(data, 3, (12, 4))
    drawn = styles(row["arm"] for row in data["rows"])
    for axes, (key, (title, unit)) in zip(panels, PANELS.items(), strict=True):
        shown = []
        for arm, (colour, marker, _) in drawn.items():
            rows = sorted((row for row in data["rows"] if row["arm"] == arm), key=lambda row: row["round"])
            if rows:
                values = {name: [(row[key] or {}).get(name) for row in rows] for name in STATISTICS}
                style = {"color": colour, "marker": marker, "ls": "--" if arm in tuple(ARMS)[1:] else "-", "label": arm}
                percents, several = [100 * row["density"] for row in rows], [row["n"] > 1 for row in rows]
                shown += _line(axes, percents, values, unit, several, ms=4, **style)
        axes.set(title=title, xlabel="percent of weights remaining")
        percent_axis(axes, {100 * row["density"] for row in data["rows"]})
        if unit == 1:
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_ylim(bottom=0)
        else:
            _zoom(axes, shown, shown)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(drawn), 6))
    return figure


def styles(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dashes of each arm or variant: those of `ARMS`, and others that none of them has."""
    names = list(dict.fromkeys(names))
    taken = {ARMS[name][0] for name in names if name in ARMS}
    spare = cycle([colour for colour in PALETTE if colour not in taken])
    others = zip((name for name in names if name not in ARMS), spare, cycle(MARKERS), cycle(DASHES), strict=False)
    own = {name: (colour, marker, dashes) for name, colour, marker, dashes in others}
    return {name: ARMS.get(name) or own[name] for name in names}


def accuracy_data(summary: dict, curves: dict) -> dict | None:
    """What `accuracy_figure` draws: the lines of its two panels. None where there are no curves.

    Left the tickets at the rounds nearest to the paper's percentages (all, of five or fewer); right, if there are
    controls, the dense network and every arm nearest to 51.3% and 21.1%. Shown until 2.5 times the median early stop:
    about 15,000 of LeNet's 50,000 iterations, as in the paper.
    """
    filled = {
        arm: {r: c for r, c in rounds.items() if c["density"] and c["iteration"]} for arm, rounds in curves.items()
    }
    arms = sorted((arm for arm, rounds in filled.items() if rounds), key=lambda arm: arm != "ticket")
    curves = {arm: filled[arm] for arm in arms[:SHOWN]}
    if not curves:
        return None
    first = next(iter(curves))
    percents = {r: 100 * curve["density"] for r, curve in sorted(curves[first].items())}
    near = [min(percents, key=lambda r: abs(math.log(percents[r] / wanted))) for wanted in PAPER_PERCENT]
    left = [(first, r) for r in (percents if len(percents) <= 5 else sorted(set(near)))]
    right = [(first, near[0])] + [(arm, r) for arm in curves for r in sorted(set(near[1:3])) if r in curves[arm]]
    right = list(dict.fromkeys(right)) if len(curves) > 1 else []

    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    stops = [(rows.get(key, {}).get("early_stop_iteration") or {}).get("mean") for key in {*left, *right}]
    stops = [stop for stop in stops if stop and math.isfinite(stop)]
    last = max(curves[arm][r]["iteration"][-1] for arm, r in left + right)
    until = min(last, 2.5 * float(np.median(stops))) if stops else last

    def line(arm, r):
        curve = {key: curves[arm][r][key] for key in ("density", "iteration", "test_accuracy")}
        return {"arm": arm, "round": r, "n": rows.get((arm, r), {}).get("n", 1), **curve}

    panels = {"left": [line(*key) for key in left], "right": [line(*key) for key in right]}
    return _head(summary, panels["left"] + panels["right"]) | {"last": last, "shown_until": until} | panels


def accuracy_figure(data: dict):
    """Test accuracy against training iteration: left by percent of weights remaining, right tickets and controls.

    Frankle & Carbin 2019, Figure 3; bars from min to max every ten evaluations where there are several trials.
    """
    sides = [data[side] for side in ("left", "right") if data[side]]
    figure, panels = _panels(data, len(sides), (6 * len(sides), 5), sharey=True)
    drawn = styles(line["arm"] for lines in sides for line in lines)
    colours = dict(zip((line["round"] for line in data["left"]), PALETTE, strict=False))
    until = data["shown_until"]
    shown, late = [], []
    for lines, axes in zip(sides, panels, strict=True):
        arms = list(dict.fromkeys(line["arm"] for line in lines))
        for place, line in enumerate(lines):
            x = np.array(line["iteration"])
            style = {"color": colours[line["round"]], "ls": drawn[line["arm"]][2], "marker": "" if len(x) > 1 else "o"}
            style["label"] = f"{_percent(100 * line['density'])}%" + f" {line['arm']}" * (len(arms) > 1)
            several = [line["n"] > 1] * len(x)
            # the bars of each line start at another evaluation, or they would lie on one another
            values = _line(axes, x, line["test_accuracy"], 100, several, lw=1.1, errorevery=(place, 10), **style)
            shown += [row[x <= until] for row in values]
            late += [row[(until / 2 <= x) & (x <= until)] for row in values]
        others = ", ".join(arms[1:])
        title = f"{arms[0]} against {others}" if others else f"{arms[0]}, by percent of weights remaining"
        part = f" (of {data['last']:,})" if until < data["last"] else ""
        axes.set(title=title, xlabel="training iteration" + part, xlim=(0, until))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("test accuracy (%)")
    _zoom(panels[0], shown, late)
    for lines, axes in zip(sides, panels, strict=True):
        arms = {line["arm"] for line in lines}
        _legend_below(axes, columns=len(arms) if len(arms) > 1 else 4)
    return figure


def _head(summary, lines):
    """Where a figure's data come from, and the different numbers of trials of its lines."""
    source = {key: summary[key] for key in ("name", "identity", "settings", "title") if key in summary}
    return source | {"trials": sorted({line["n"] for line in lines})}


def _panels(data, columns, size, **shared):
    """A titled Figure of its own, outside pyplot's global state, and its axes in a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    low, high = data["trials"][0], data["trials"][-1]
    trials = f"{low} to {high}" if low < high else f"{high}"
    trials += " trials: mean, bars from min to max" if high > 1 else " trial"
    title = data.get("title", f"{data['settings']['model']} on {data['settings']['dataset']}")
    figure.suptitle(f"{title}, {trials}")
    return figure, figure.subplots(1, columns, squeeze=False, **shared)[0]


def _line(axes, x, values, unit, several, **style):
    """Draw the means, a gap where one is missing, with bars where `several` trials ran; mean, min and max as drawn."""
    mean, low, high = (unit * np.array(values[name], dtype=float) for name in STATISTICS)
    bars = np.where(several, np.maximum([mean - low, high - mean], 0), np.nan) if any(several) else None
    axes.errorbar(x, mean, bars, ecolor=(style["color"], 0.6), elinewidth=0.9, capsize=1.5, **style)
    return [mean, low, high]


def _percent(value):
    """100, 51.3, 7.0, 0.2, 0.05"""
    return f"{value:.0f}" if value > 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.1g}"


def percent_axis(axes, percents):
    """A logarithmic axis from 100 down, labelled at as many of `percents` as fit: eight of the paper's 28 rounds."""
    low, high = math.log(min(percents)), math.log(max(percents))
    margin = 0.05 * (high - low) or 0.2
    ticks = []
    for percent in sorted(percents, reverse=True):
        if not ticks or math.log(ticks[-1] / percent) > (high - low) / 7.2:
            ticks.append(percent)
    axes.set_xscale("log")
    axes.set_xlim(math.exp(high + margin), math.exp(low - margin))
    axes.set_xticks(ticks, [_percent(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _zoom(axes, shown, late):
    """Fit y to arrays of percentages: to all that is shown at the top, at the bottom to those late in training.

    A few that lie far below the others leave the frame: 5 points from the top or, if the others need more, beyond.
    """
    shown, late = (values[np.isfinite(values)] for values in map(np.concatenate, (shown, late)))
    if len(late):
        top = shown.max()
        bottom = max(late.min(), top - max(5, 4 * (top - np.quantile(late, 0.25))))
        margin = 0.05 * (top - bottom) or 0.5
        axes.set_ylim(bottom - margin, top + margin)


def _legend_below(axes, columns):
    """A legend under the axes, which also says which lines lie wholly out of their range."""
    handles, labels = axes.get_legend_handles_labels()
    lines, bottom, right = [handle[0] for handle in handles], axes.get_ylim()[0], axes.get_xlim()[1]
    seen = [((line.get_ydata(orig=False) >= bottom) & (line.get_xdata(orig=False) <= right)).any() for line in lines]
    labels = [label if inside else f"{label} (out of view)" for label, inside in zip(labels, seen, strict=True)]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
    axes.legend(lines, labels, ncols=columns, fontsize=9, handlelength=1.9, columnspacing=1.4, **place)


def write(stem, figure, data):
    """`stem` with .png, .svg and .json, each by rename; their paths."""
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg", ".json")]
    for path in paths[:2]:
        part = path.with_name(path.name + ".part")
        try:
            figure.savefig(part, format=path.suffix[1:], dpi=150, metadata={"Date": None})
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    write_json(paths[2], data, indent=None)
    return paths
