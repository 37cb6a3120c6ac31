"""Test accuracy against training iteration, for several percentages of weights: Frankle & Carbin, figure 3."""

from .curves import by_iteration, chosen, colours_of, filled, lines_of, nearest, span
from .frame import head, legend_below, titled, zoom

SHOWN = 4  # arms at most in the figure of curves, where each has two lines or more


def accuracy_data(summary: dict, curves: dict) -> dict | None:
    """What `accuracy_figure` draws: the lines of its two panels. None where there are no curves.

    Left the tickets at the rounds nearest to the paper's percentages (all, of five or fewer); right, if there are
    controls, the dense network and every arm nearest to 51.3% and 21.1%.
    """
    curves = dict(list(filled(curves).items())[:SHOWN])
    if not curves:
        return None
    first = next(iter(curves))
    near = nearest(curves[first])
    left = [(first, r) for r in chosen(curves[first])]
    right = [(first, near[0])] + [(arm, r) for arm in curves for r in sorted(set(near[1:3])) if r in curves[arm]]
    right = list(dict.fromkeys(right)) if len(curves) > 1 else []
    panels = {
        side: lines_of(keys, ("test_accuracy",), summary, curves) for side, keys in (("left", left), ("right", right))
    }
    return head(summary, panels["left"] + panels["right"]) | span({*left, *right}, summary, curves) | panels


def accuracy_figure(data: dict):
    """Test accuracy against training iteration: left by percent of weights remaining, right tickets and controls.

    Frankle & Carbin 2019, Figure 3; bars from min to max every ten evaluations where there are several trials.
    """
    sides = [data[side] for side in ("left", "right") if data[side]]
    figure = titled(data, (6 * len(sides), 5))
    panels = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    colours = colours_of(data["left"])
    shown, late = [], []
    for lines, axes in zip(sides, panels, strict=True):
        for found, more in zip(
            (shown, late), by_iteration(axes, lines, "test_accuracy", 100, data, colours), strict=True
        ):
            found += more
        first, *others = dict.fromkeys(line["arm"] for line in lines)
        axes.set_title(
            f"{first} against {', '.join(others)}" if others else f"{first}, by percent of weights remaining"
        )
    panels[0].set_ylabel("test accuracy (%)")
    zoom(panels[0], shown, late)
    for lines, axes in zip(sides, panels, strict=True):
        arms = {line["arm"] for line in lines}
        legend_below(axes, columns=len(arms) if len(arms) > 1 else 4)
    return figure
