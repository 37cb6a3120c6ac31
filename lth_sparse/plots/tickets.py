"""When training is best and how good it is, against percent of weights remaining: Frankle & Carbin, figures 1 and 4."""

from .frame import by_percent, head, titled, zoom

PANELS = {  # what is drawn, its title, what to multiply it with
    "early_stop_iteration": ("early-stop iteration", 1),
    "test_accuracy": ("test accuracy at early stop (%)", 100),
    "final_test_accuracy": ("test accuracy at end of training (%)", 100),
}


def tickets_data(summary: dict) -> dict | None:
    """What `tickets_figure` draws: the rows, with the quantities of its panels. None where there are no rows."""
    keys = ("arm", "round", "density", "n", *PANELS)
    rows = [{key: row.get(key) for key in keys} for row in summary["rows"] if row["density"]]
    return head(summary, rows) | {"rows": rows} if rows else None


def tickets_figure(data: dict):
    """Early stop and accuracies against percent of weights remaining, one line per arm.

    Frankle & Carbin 2019, Figures 1 and 4; bars from min to max over trials where there are several.
    """
    figure = titled(data, (12, 4))
    panels = figure.subplots(1, 3)
    for axes, (key, (title, unit)) in zip(panels, PANELS.items(), strict=True):
        shown = by_percent(axes, data["rows"], key, unit)
        axes.set_title(title)
        if unit == 1:
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set_ylim(bottom=0)
        else:
            zoom(axes, shown, shown)
    lines, arms = panels[0].get_legend_handles_labels()
    figure.legend(lines, arms, loc="outside lower center", ncols=min(len(arms), 6))
    return figure
