"""What the figures share: colours, panels, lines with bars, axes, legends, and the files they are written to."""

import math
import os
from collections.abc import Iterable
from itertools import cycle

import numpy as np

from ..runs import write_json

# Okabe & Ito, which colour-blind readers can tell apart; without their yellow, too pale on white.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
ARMS = {  # colour, marker, and the dashes that tell arms apart where the colour says the round
    "ticket": (PALETTE[1], "o", "-"),
    "reinit": (PALETTE[2], "s", "--"),
    "reinit-chain": (PALETTE[4], "^", "-."),
    "random": (PALETTE[3], "D", ":"),
}
MARKERS, DASHES = "osD^vP*X", ("-", "--", ":", "-.")  # one marker more than colours: pairs come again after 56
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


def styles(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, marker and dashes of each arm or variant: those of `ARMS`, and others that none of them has."""
    names = list(dict.fromkeys(names))
    taken = {ARMS[name][0] for name in names if name in ARMS}
    spare = cycle([colour for colour in PALETTE if colour not in taken])
    others = zip((name for name in names if name not in ARMS), spare, cycle(MARKERS), cycle(DASHES), strict=False)
    own = {name: (colour, marker, dashes) for name, colour, marker, dashes in others}
    return {name: ARMS.get(name) or own[name] for name in names}


def head(summary, lines):
    """Where a figure's data come from, and the different numbers of trials of its lines."""
    source = {key: summary[key] for key in ("name", "identity", "settings", "title") if key in summary}
    return source | {"trials": sorted({line["n"] for line in lines})}


def titled(data, size):
    """A titled Figure of its own, outside pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    low, high = data["trials"][0], data["trials"][-1]
    trials = f"{low} to {high}" if low < high else f"{high}"
    trials += " trials: mean, bars from min to max" if high > 1 else " trial"
    title = data.get("title", f"{data['settings']['model']} on {data['settings']['dataset']}")
    figure.suptitle(f"{title}, {trials}")
    return figure


def by_percent(axes, rows, key, unit):
    """A quantity of `rows`, `unit` times, against percent of weights remaining, one line per arm; what is drawn."""
    shown = []
    for arm, (colour, marker, _) in styles(row["arm"] for row in rows).items():
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["round"])
        values = {name: [(row[key] or {}).get(name) for row in own] for name in STATISTICS}
        style = {"color": colour, "marker": marker, "ls": "--" if arm in tuple(ARMS)[1:] else "-", "label": arm}
        percents, several = [100 * row["density"] for row in own], [row["n"] > 1 for row in own]
        shown += with_bars(axes, percents, values, unit, several, ms=4, **style)
    axes.set_xlabel("percent of weights remaining")
    percent_axis(axes, {100 * row["density"] for row in rows})
    return shown


def with_bars(axes, x, values, unit, several, **style):
    """Draw the means, a gap where one is missing, with bars where `several` trials ran; mean, min and max as drawn."""
    mean, low, high = (unit * np.array(values[name], dtype=float) for name in STATISTICS)
    bars = np.where(several, np.maximum([mean - low, high - mean], 0), np.nan) if any(several) else None
    axes.errorbar(x, mean, bars, ecolor=(style["color"], 0.6), elinewidth=0.9, capsize=1.5, **style)
    return [mean, low, high]


def percent(value):
    """100, 51.3, 7.0, 0.2, 0.05"""
    return f"{value:.0f}" if value > 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.1g}"


def percent_axis(axes, percents):
    """A logarithmic axis from 100 down, labelled at as many of `percents` as fit: eight of the paper's 28 rounds."""
    low, high = math.log(min(percents)), math.log(max(percents))
    margin = 0.05 * (high - low) or 0.2
    ticks = []
    for value in sorted(percents, reverse=True):
        if not ticks or math.log(ticks[-1] / value) > (high - low) / 7.2:
            ticks.append(value)
    axes.set_xscale("log")
    axes.set_xlim(math.exp(high + margin), math.exp(low - margin))
    axes.set_xticks(ticks, [percent(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def zoom(axes, shown, late):
    """Fit y to arrays of percentages: to all that is shown at the top, at the bottom to those late in training.

    A few that lie far below the others leave the frame: 5 points from the top or, if the others need more, beyond.
    """
    shown, late = (values[np.isfinite(values)] for values in map(np.concatenate, (shown, late)))
    if len(late):
        top = shown.max()
        bottom = max(late.min(), top - max(5, 4 * (top - np.quantile(late, 0.25))))
        margin = 0.05 * (top - bottom) or 0.5
        axes.set_ylim(bottom - margin, top + margin)


def in_view(axes):
    """The lines of `axes`, their labels, and whether anything of them lies in the axes' range."""
    handles, labels = axes.get_legend_handles_labels()
    (bottom, top), (_, right) = axes.get_ylim(), axes.get_xlim()
    lines = [handle[0] for handle in handles]
    points = [(line.get_xdata(orig=False), line.get_ydata(orig=False)) for line in lines]
    return lines, labels, [bool(((y >= bottom) & (y <= top) & (x <= right)).any()) for x, y in points]


def legend_below(axes, columns):
    """A legend under the axes, which also says which lines lie wholly out of their range."""
    lines, labels, seen = in_view(axes)
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
