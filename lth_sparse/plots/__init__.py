"""The figures of a run, each drawn from the very numbers that are written as JSON beside it."""

from pathlib import Path

from .accuracy import accuracy_data, accuracy_figure
from .frame import ARMS, PALETTE, STATISTICS, STYLE, percent_axis, styles, write
from .losses import losses_data, losses_figure
from .tickets import PANELS, tickets_data, tickets_figure

__all__ = [
    "ARMS",
    "PALETTE",
    "PANELS",
    "STATISTICS",
    "STYLE",
    "accuracy_data",
    "accuracy_figure",
    "draw",
    "losses_data",
    "losses_figure",
    "percent_axis",
    "styles",
    "tickets_data",
    "tickets_figure",
    "write",
]


def draw(summary: dict, curves: dict, folder: Path) -> list[Path]:
    """Write what the data allow of `tickets`, `accuracy` and `losses`, each as .png, .svg and .json; their paths.

    Args:
        summary: name, identity, settings, and rows: one per arm and round; what is missing is None or NaN.
        curves: {arm: {round: {"density", "iteration": [n], "test_accuracy": {"mean": [n], "min", "max"}, ...}}}.
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
        if data := losses_data(summary, curves):
            paths += write(folder / "losses", losses_figure(data), data)
    return paths
