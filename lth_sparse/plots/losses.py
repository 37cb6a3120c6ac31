"""Losses and validation accuracy: in training, and at early stop against percent of weights remaining."""

from bisect import bisect_right

import numpy as np

from .curves import by_iteration, chosen, colours_of, filled, lines_of, span
from .frame import by_percent, head, in_view, titled, zoom

CURVES = {  # against iteration: what is drawn, its title, what to multiply it with
    "train_loss": ("training loss", 1),
    "validation_loss": ("validation loss", 1),
    "validation_accuracy": ("validation accuracy (%)", 100),
}
STOPS = {  # the same at early stop, where the loss of the test images takes the place of that of training
    "test_loss": ("test loss at early stop", 1),
    "validation_loss": ("validation loss at early stop", 1),
    "validation_accuracy": ("validation accuracy at early stop (%)", 100),
}


def losses_data(summary: dict, curves: dict) -> dict | None:
    """What `losses_figure` draws: the first arm's rounds against iteration, all rows at early stop. None without both.

    The rounds are chosen, and their iterations end, as in `accuracy_data`.
    """
    keys = ("arm", "round", "density", "n", *STOPS)
    rows = [{key: row.get(key) for key in keys} for row in summary["rows"] if row["density"]]
    first = next(iter(filled(curves)), None)
    drawn = [(first, r) for r in chosen(curves[first])] if first else []
    shown = span(drawn, summary, curves) if drawn else {}
    lines = [_cut(line, shown["shown_until"]) for line in lines_of(drawn, CURVES, summary, curves)]
    return head(summary, lines + rows) | shown | {"lines": lines, "rows": rows} if lines or rows else None


def _cut(line, until):
    """A line without what comes later than is shown, but for the one evaluation that it goes on to."""
    stop = bisect_right(line["iteration"], until) + 1
    values = {key: {name: values[:stop] for name, values in line[key].items()} for key in CURVES}
    return line | {"iteration": line["iteration"][:stop]} | values


def losses_figure(data: dict):
    """Above training and validation of the first arm, by percent of weights remaining; below all arms at early stop.

    The training loss is the mean since the last evaluation. Losses are on a logarithmic axis where they lie far apart.
    Bars from min to max over trials where there are several.
    """
    parts = [part for part in ("lines", "rows") if data[part]]
    figure = titled(data, (12, 4.2 * len(parts)))
    for part, place in zip(parts, figure.subfigures(len(parts), 1, squeeze=False)[:, 0], strict=True):
        (_lines if part == "lines" else _stops)(place, data)
    return figure


def _lines(figure, data):
    panels, drawn = figure.subplots(1, len(CURVES)), data["lines"]
    colours = colours_of(drawn)
    for axes, (key, (title, unit)) in zip(panels, CURVES.items(), strict=True):
        shown, late = by_iteration(axes, drawn, key, unit, data, colours)
        axes.set_title(title)
        _fit(axes, unit, shown, late)
    seen = zip(*(in_view(axes)[2] for axes in panels), strict=True)
    handles, labels, _ = in_view(panels[0])
    labels = [label + " (not in every panel)" * (not all(inside)) for label, inside in zip(labels, seen, strict=True)]
    _legend(figure, handles, labels, title=f"{drawn[0]['arm']}, by percent of weights remaining")


def _stops(figure, data):
    panels = figure.subplots(1, len(STOPS))
    for axes, (key, (title, unit)) in zip(panels, STOPS.items(), strict=True):
        shown = by_percent(axes, data["rows"], key, unit)
        axes.set_title(title)
        _fit(axes, unit, shown, shown)
    _legend(figure, *panels[0].get_legend_handles_labels())


def _legend(figure, handles, labels, **given):
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), **given)


def _fit(axes, unit, shown, late):
    """Fit y to what is shown: percentages as `zoom` does, losses on a logarithmic axis where they lie far apart.

    What lies far above nine tenths of them leaves the frame: a network that diverges reaches 1e20.
    """
    from matplotlib.ticker import LogLocator

    if unit == 100:
        zoom(axes, shown, late)
        return
    values = np.concatenate(shown)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 10 * values.min():
        bottom, top = values.min(), min(values.max(), 100 * np.quantile(values, 0.9))
        margin = (top / bottom) ** 0.05
        axes.set_yscale("log")
        axes.set_ylim(bottom / margin, top * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 1e4 * bottom else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
