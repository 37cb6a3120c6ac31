import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lth_sparse import plots

STEMS = ("tickets", "accuracy", "losses")
SUFFIXES = ("png", "svg", "json")
ALL = [f"{stem}.{suffix}" for stem in STEMS for suffix in SUFFIXES]


def run(rounds=15, trials=3, arms=("ticket", "reinit", "random"), evaluations=60, ends=None):
    """A summary and curves as `report` makes them: accuracies rise to a level that falls faster for the controls.

    Losses fall with the errors; that of validation rises again after a fifth of the training, that of training not.
    """
    random, rows, curves = np.random.default_rng(0), [], {}
    iteration = [100 * (i + 1) for i in range(evaluations)]
    for arm in arms:
        curves[arm] = {}
        for r in range(min(rounds, (ends or {}).get(arm, rounds)) + 1):
            level = 0.98 - (0.0002 if arm == "ticket" else 0.002) * r
            history = level - 0.3 * np.exp(-np.arange(evaluations) / 2) + random.normal(0, 0.001, (trials, evaluations))
            accuracy = spread(history)
            curves[arm][r] = {"density": 0.8**r, "iteration": iteration, "test_accuracy": accuracy}
            late = np.maximum(0, np.arange(evaluations) - evaluations / 5) / evaluations
            loss = {"train_loss": 1 - history, "validation_loss": 1 - history + late / 20, "test_loss": 1 - history}
            curves[arm][r] |= {key: spread(values) for key, values in loss.items()}
            curves[arm][r] |= {"validation_accuracy": spread(history - 0.01)}
            row = {"arm": arm, "round": r, "density": 0.8**r, "n": trials, "seconds": spread(np.ones(trials))}
            row["early_stop_iteration"] = spread(100 * random.integers(5, 10, trials))
            row["test_accuracy"] = row["validation_accuracy"] = row["train_accuracy"] = spread(history.max(1))
            row["test_loss"] = row["validation_loss"] = spread(1 - history.max(1))
            rows.append(row | {"final_test_accuracy": spread(history[:, -1])})
    settings = {"model": "lenet-300-100", "dataset": "mnist", "trials": trials, "iterations": 100 * evaluations}
    return {"name": "lenet-mnist", "identity": "578d16b3", "settings": settings, "rows": rows}, curves


def spread(values):
    return {"mean": values.mean(0).tolist(), "min": values.min(0).tolist(), "max": values.max(0).tolist()}


def tickets(summary):
    return plots.tickets_figure(plots.tickets_data(summary))


def accuracy(summary, curves):
    return plots.accuracy_figure(plots.accuracy_data(summary, curves))


def losses(summary, curves):
    return plots.losses_figure(plots.losses_data(summary, curves))


def paint(*figures):
    """Draw every figure once, on nothing."""
    for figure in figures:
        FigureCanvasAgg(figure).draw()


def drawn(axes):
    """The lines of `axes` by label, and which of them have bars."""
    containers = dict(zip(axes.get_legend_handles_labels()[1], axes.containers, strict=True))
    return {label: bars[0] for label, bars in containers.items()}, {k for k, bars in containers.items() if bars[2]}


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The paths of the figures of `run()`, by name, in a folder made for them."""
    paths = plots.draw(*run(), tmp_path_factory.mktemp("plots") / "made" / "figures")
    return {path.name: path for path in paths}


def test_every_figure_is_written_three_times_and_nothing_else(written):
    assert list(written) == ALL
    assert sorted(path.name for path in written["tickets.png"].parent.iterdir()) == sorted(ALL)
    for stem in STEMS:
        assert written[f"{stem}.png"].read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in written[f"{stem}.svg"].read_bytes()


def test_the_data_beside_a_figure_equal_the_input(written):
    summary, curves = run()
    data = json.loads(written["tickets.json"].read_text())
    assert (data["identity"], data["settings"], data["trials"]) == ("578d16b3", summary["settings"], [3])
    for row, given in zip(data["rows"], summary["rows"], strict=True):
        assert row == {key: given[key] for key in row} and set(plots.PANELS) < set(row)
    data = json.loads(written["accuracy.json"].read_text())
    for line in data["left"] + data["right"]:
        given = curves[line["arm"]][line["round"]]
        assert set(line) == {"arm", "round", "n", "density", "iteration", "test_accuracy"}, "nothing that is not drawn"
        assert all(line[key] == given[key] for key in ("density", "iteration", "test_accuracy"))
    data = json.loads(written["losses.json"].read_text())
    for row, given in zip(data["rows"], summary["rows"], strict=True):
        assert row == {key: given[key] for key in row} and {"test_loss", "validation_loss"} < set(row)
    for line in data["lines"]:
        given, shown = curves["ticket"][line["round"]], sum(i <= data["shown_until"] for i in line["iteration"])
        assert 5 < shown + 1 == len(line["iteration"]) < 60, "one more than is shown"
        for key in ("train_loss", "validation_loss", "validation_accuracy"):
            assert line[key] == {name: values[: shown + 1] for name, values in given[key].items()}


def test_equal_data_give_equal_bytes_whatever_the_users_style(written, tmp_path):
    import matplotlib

    pyplot = "matplotlib.pyplot" in sys.modules
    with matplotlib.rc_context({"font.weight": "bold", "font.size": 20, "savefig.dpi": 30, "svg.hashsalt": None}):
        paths = plots.draw(*run(), tmp_path)
        assert matplotlib.rcParams["font.size"] == 20
    assert ("matplotlib.pyplot" in sys.modules) == pyplot
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in written.values()]


def test_a_figure_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", full)
    (tmp_path / "tickets.png").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        plots.draw(*run(rounds=1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"tickets.png": b"old"}


def test_tickets_shows_every_arm_from_dense_to_sparse_on_a_log_axis():
    summary, _ = run()
    panels = tickets(summary).axes
    assert [axes.get_title() for axes in panels] == [title for title, _ in plots.PANELS.values()]
    for axes, (key, (_, unit)) in zip(panels, plots.PANELS.items(), strict=True):
        assert axes.get_xscale() == "log" and axes.get_xlim()[0] > 100 > 100 * 0.8**15 > axes.get_xlim()[1]
        assert axes.get_xlabel() == "percent of weights remaining"
        lines, _ = drawn(axes)
        assert list(lines) == ["ticket", "reinit", "random"]
        assert [line.get_linestyle() for line in lines.values()] == ["-", "--", "--"]
        for arm, line in lines.items():
            rows = [row for row in summary["rows"] if row["arm"] == arm]
            np.testing.assert_allclose(line.get_xdata(orig=False), [100 * row["density"] for row in rows])
            np.testing.assert_allclose(line.get_ydata(orig=False), [unit * row[key]["mean"] for row in rows])


@pytest.mark.parametrize(
    "rounds, labels",
    [
        (0, ["100"]),
        (3, ["100", "80.0", "64.0", "51.2"]),
        (15, ["100", "51.2", "26.2", "13.4", "6.9", "3.5"]),
        (28, ["100", "41.0", "16.8", "6.9", "2.8", "1.2", "0.5", "0.2"]),
    ],
)
def test_ticks_are_percentages_of_rounds_thinned_to_what_fits(rounds, labels):
    axes = tickets(run(rounds, trials=1)[0]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == labels
    assert set(axes.get_xticks()) <= {100 * 0.8**r for r in range(rounds + 1)} and not len(axes.get_xticks(minor=True))


def test_bars_reach_from_min_to_max_and_only_where_several_trials_ran():
    summary, curves = run(rounds=2)
    axes = tickets(summary).axes[1]
    assert drawn(axes)[1] == {"ticket", "reinit", "random"}
    bars = axes.containers[0][2][0].get_segments()
    ends = [(100 * row["test_accuracy"]["min"], 100 * row["test_accuracy"]["max"]) for row in summary["rows"][:3]]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], ends)
    single, single_curves = run(rounds=2, trials=1)
    panels = tickets(single).axes + accuracy(single, single_curves).axes
    assert len(panels) == 5 and not any(drawn(axes)[1] for axes in panels)
    assert all(drawn(axes)[1] for axes in accuracy(summary, curves).axes)
    summary["rows"][1]["n"] = 1
    assert [len(bar) for bar in tickets(summary).axes[0].containers[0][2][0].get_segments()] == [2, 0, 2]


def test_accuracy_draws_a_bar_every_ten_evaluations_each_line_at_its_own():
    lines = accuracy(*run(rounds=2)).axes[0].containers
    bars = [[bar[0][0] for bar in container[2][0].get_segments()] for container in lines]
    assert bars == [[100 * (start + 10 * i + 1) for i in range(6)] for start in range(3)]


def test_accuracy_shows_the_papers_percentages_left_and_the_controls_right():
    left, right = accuracy(*run(rounds=28)).axes
    assert legend(left) == ["100%", "51.2%", "21.0%", "6.9%", "3.5%", "1.8%", "0.2%"]
    assert legend(right) == ["100% ticket"] + [
        f"{p}% {a}" for a in ("ticket", "reinit", "random") for p in (51.2, 21.0)
    ]
    lines = drawn(left)[0] | drawn(right)[0]
    assert len({line.get_color() for line in drawn(left)[0].values()}) == 7
    assert [lines[f"51.2% {arm}"].get_linestyle() for arm in ("ticket", "reinit", "random")] == ["-", "--", ":"]
    assert {lines[f"51.2% {arm}"].get_color() for arm in ("ticket", "reinit", "random")} == {lines["51.2%"].get_color()}


@pytest.mark.parametrize(
    "rounds, shown", [(0, [0]), (4, [0, 1, 2, 3, 4]), (8, [0, 3, 7, 8]), (16, [0, 3, 7, 12, 15, 16])]
)
def test_accuracy_shows_all_rounds_of_a_short_run(rounds, shown):
    assert [line["round"] for line in plots.accuracy_data(*run(rounds))["left"]] == shown


def test_accuracy_shows_two_and_a_half_median_early_stops_and_says_of_how_many():
    summary, curves = run()
    for row in summary["rows"]:
        row["early_stop_iteration"]["mean"] = 1000 if row["arm"] == "ticket" else 1400
    axes = accuracy(summary, curves).axes[0]
    assert axes.get_xlim() == (0, 2500) and axes.get_xlabel() == "training iteration (of 6,000)"
    for row in summary["rows"]:
        row["early_stop_iteration"]["mean"] = 5000
    axes = accuracy(summary, curves).axes[0]
    assert axes.get_xlim() == (0, 6000) and axes.get_xlabel() == "training iteration"


def test_the_y_axis_is_set_by_late_accuracies():
    figure = accuracy(*run())  # accuracies start below 70%, end between 95 and 98
    bottom, top = figure.axes[0].get_ylim()
    assert 93 < bottom < 96.7 and 98 < top < 99
    assert figure.axes[1].get_ylim() == (bottom, top)


def test_lines_that_collapsed_do_not_flatten_the_others_and_the_legend_names_them():
    summary, curves = run(rounds=20)
    for stats in [curves["ticket"][20]["test_accuracy"], *(row["test_accuracy"] for row in summary["rows"][19:21])]:
        stats |= {key: 0 * np.array(value) + 0.1 for key, value in stats.items()}
    left = accuracy(summary, curves).axes[0]
    assert left.get_ylim()[0] > 90 and legend(left)[-1] == "1.2% (out of view)"
    assert not any("view" in label for label in legend(left)[:-1])
    assert tickets(summary).axes[1].get_ylim()[0] > 80


def test_an_arm_that_ended_early_simply_ends():
    summary, curves = run(ends={"random": 4})
    lines, _ = drawn(tickets(summary).axes[2])
    assert [len(line.get_xdata()) for line in lines.values()] == [16, 16, 5]
    right = accuracy(summary, curves).axes[1]
    assert "51.2% random" in legend(right) and "21.0% random" not in legend(right)


def test_titles_tell_model_data_set_and_trials():
    summary, curves = run(rounds=1)
    assert tickets(summary).get_suptitle() == "lenet-300-100 on mnist, 3 trials: mean, bars from min to max"
    summary["rows"][-1]["n"] = 2
    assert accuracy(summary, curves).get_suptitle().startswith("lenet-300-100 on mnist, 2 to 3 trials")
    assert tickets(run(rounds=1, trials=1)[0]).get_suptitle() == "lenet-300-100 on mnist, 1 trial"


def test_a_diverged_run_leaves_gaps_and_null(tmp_path):
    summary, curves = run(rounds=5)
    nothing = {"mean": None, "min": None, "max": None}
    summary["rows"][2] |= {"test_accuracy": None, "final_test_accuracy": nothing, "early_stop_iteration": nothing}
    summary["rows"][8]["test_accuracy"] = {"mean": math.nan, "min": math.nan, "max": math.inf}
    for values in [*curves["ticket"][3]["test_accuracy"].values(), *curves["ticket"][3]["train_loss"].values()]:
        values[10:] = [None] * 50
    paths = plots.draw(summary, curves, tmp_path)
    assert [path.name for path in paths] == ALL
    rows = json.loads(paths[2].read_text())["rows"]
    assert rows[2]["test_accuracy"] is None and rows[8]["test_accuracy"] == nothing
    gaps = np.isnan(drawn(tickets(summary).axes[1])[0]["ticket"].get_ydata(orig=False))
    assert gaps.tolist() == [False, False, True, False, False, False]
    gaps = np.isnan(drawn(losses(summary, curves).axes[0])[0]["51.2%"].get_ydata(orig=False))
    assert len(gaps) > 11 and gaps.tolist() == [False] * 10 + [True] * (len(gaps) - 10)


def test_a_run_of_nothing_but_missing_values_is_drawn():
    summary, curves = run(rounds=2, arms=("reinit", "ticket"))
    for row in summary["rows"]:
        row |= dict.fromkeys((*plots.PANELS, "validation_loss", "test_loss", "validation_accuracy"))
    for curve in [curve for arm in curves.values() for curve in arm.values()]:
        for name in set(curve) - {"density", "iteration"}:
            curve[name] = {key: [None] * 60 for key in plots.STATISTICS}
    paint(tickets(summary), accuracy(summary, curves), losses(summary, curves))
    assert legend(accuracy(summary, curves).axes[0])[0] == "100% (out of view)"


@pytest.mark.parametrize(
    "arms, rounds, trials, evaluations",
    [
        (("ticket",), 0, 1, 1),
        (("random",), 1, 2, 2),
        (("random", "reinit-chain"), 0, 2, 1),
        (tuple(plots.ARMS), 15, 2, 12),
    ],
)
def test_any_arms_and_the_shortest_runs_are_drawn(arms, rounds, trials, evaluations):
    summary, curves = run(rounds, trials, arms, evaluations)
    paint(tickets(summary), accuracy(summary, curves), losses(summary, curves))
    panels = accuracy(summary, curves).axes
    assert len(panels) == min(2, len(arms))
    markers = {line.get_marker() for axes in panels for line in drawn(axes)[0].values()}
    assert markers == ({"o"} if evaluations == 1 else {""})


def test_figures_without_data_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "write", lambda stem, *_: [stem.with_name(f"{stem.name}.{s}") for s in SUFFIXES])
    summary, curves = run(rounds=1)
    empty = {arm: {r: curve | {"iteration": []} for r, curve in rounds.items()} for arm, rounds in curves.items()}
    assert [path.name for path in plots.draw(summary, empty, tmp_path)] == ALL[:3] + ALL[6:]
    assert [path.name for path in plots.draw(summary | {"rows": []}, curves, tmp_path)] == ALL[3:]
    assert [len(losses(*given).axes) for given in ((summary, empty), (summary | {"rows": []}, curves))] == [3, 3]
    assert plots.draw(summary | {"rows": []}, {"ticket": {}}, tmp_path / "none") == []
    emptied = summary["rows"][0] | {"round": 9, "density": 0.0}
    assert plots.tickets_data(summary | {"rows": [emptied]}) is None


def test_nothing_is_cut_off_and_panels_do_not_overlap():
    arms = tuple(plots.ARMS)
    for figure in (tickets(run(28, arms=arms)[0]), accuracy(*run(28, arms=arms)), losses(*run(28, arms=arms))):
        paint(figure)
        frames = [axes.get_tightbbox() for axes in figure.axes]
        assert all(a.x1 <= b.x0 or a.y0 >= b.y1 for a, b in zip(frames, frames[1:], strict=False))
        assert all(f.x0 >= 0 and f.y0 >= 0 and f.x1 <= figure.bbox.x1 and f.y1 <= figure.bbox.y1 for f in frames)
        for axes in figure.axes:
            ticks = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
            inside = sorted((t.x0, t.x1) for t in ticks if axes.bbox.x0 <= (t.x0 + t.x1) / 2 <= axes.bbox.x1)
            assert all(a[1] < b[0] for a, b in zip(inside, inside[1:], strict=False))


def test_every_arm_or_variant_has_a_style_of_its_own():
    assert plots.styles(plots.ARMS) == plots.ARMS
    others = [f"variant {i}" for i in range(4)]
    found = plots.styles(["random", *others, "ticket", "random"])
    assert list(found) == ["random", *others, "ticket"]
    assert found["ticket"] == plots.ARMS["ticket"] and found["random"] == plots.ARMS["random"]
    colours = [colour for colour, _, _ in found.values()]
    assert len(set(colours)) == len(colours) and set(colours) <= set(plots.PALETTE)
    many = plots.styles(f"variant {i}" for i in range(20))
    assert len({style[:2] for style in many.values()}) == 20, "colours come again with other markers"
    assert plots.styles(["a", "b"]) == plots.styles(["a", "b", "a"])


def test_variants_are_drawn_beside_each_other():
    summary, _ = run(rounds=3, arms=("fast", "slow", "ticket"))
    lines, _ = drawn(tickets(summary).axes[0])
    styles = {name: (line.get_color(), line.get_marker()) for name, line in lines.items()}
    assert styles == {name: style[:2] for name, style in plots.styles(lines).items()}


def test_of_many_arms_the_ticket_and_the_first_have_curves():
    summary, curves = run(rounds=1, arms=("a", "b", "c", "d", "ticket"))
    data = plots.accuracy_data(summary, curves)
    assert {line["arm"] for line in data["left"]} == {"ticket"}
    assert list(dict.fromkeys(line["arm"] for line in data["right"])) == ["ticket", "a", "b", "c"]


SHOWN = [("train_loss", 1), ("validation_loss", 1), ("validation_accuracy", 100)]


def test_losses_shows_the_rounds_of_the_first_arm_above():
    summary, curves = run(rounds=16)
    panels = losses(summary, curves).axes[:3]
    titles = ["training loss", "validation loss", "validation accuracy (%)"]
    assert [axes.get_title() for axes in panels] == titles
    for axes, (key, unit) in zip(panels, SHOWN, strict=True):
        lines, bars = drawn(axes)
        assert list(lines) == ["100%", "51.2%", "21.0%", "6.9%", "3.5%", "2.8%"] and bars == set(lines)
        for line, r in zip(lines.values(), [0, 3, 7, 12, 15, 16], strict=True):
            (x, y), given = line.get_data(orig=False), curves["ticket"][r]
            np.testing.assert_array_equal(x, given["iteration"][: len(x)])
            np.testing.assert_allclose(y, unit * np.array(given[key]["mean"][: len(x)]))
            assert x[-2] <= axes.get_xlim()[1] < x[-1] < 6000, "the line goes on to the frame"


def test_losses_shows_all_arms_at_early_stop_below():
    summary, curves = run(rounds=16)
    panels = losses(summary, curves).axes[3:]
    titles = ["test loss at early stop", "validation loss at early stop", "validation accuracy at early stop (%)"]
    assert [axes.get_title() for axes in panels] == titles
    for axes, (key, unit) in zip(panels, [("test_loss", 1), *SHOWN[1:]], strict=True):
        lines, _ = drawn(axes)
        assert list(lines) == ["ticket", "reinit", "random"] and axes.get_xlim()[0] > axes.get_xlim()[1]
        for arm, line in lines.items():
            wanted = [unit * row[key]["mean"] for row in summary["rows"] if row["arm"] == arm]
            np.testing.assert_allclose(line.get_ydata(orig=False), wanted)


def test_losses_are_on_a_log_axis_where_they_lie_far_apart():
    scales = [axes.get_yscale() for axes in losses(*run(rounds=2)).axes]
    assert scales == ["log", "log", "linear", "linear", "linear", "linear"]


def test_a_network_that_diverged_or_knows_all_by_heart_does_not_flatten_the_others():
    summary, curves = run(rounds=4, trials=1)
    for name, values in (("validation_loss", [1e20] * 3 + [None] * 57), ("train_loss", [0.2] * 5 + [0.0] * 55)):
        curves["ticket"][4][name] = dict.fromkeys(plots.STATISTICS, values)
    figure = losses(summary, curves)
    (bottom, top), (lowest, highest) = (axes.get_ylim() for axes in figure.axes[:2])
    assert 0.001 < bottom < 0.03 and 0.2 < top < 1
    assert 0.01 < lowest < 0.03 and 0.3 < highest < 100
    labels = [text.get_text() for text in figure.subfigs[0].legends[0].get_texts()]
    assert labels == ["100%", "80.0%", "64.0%", "51.2%", "41.0% (not in every panel)"]
