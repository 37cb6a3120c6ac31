"""What is shown of the benchmarks' records: crossovers, tables, figures, and the README's part."""

import io
import json
import math
from pathlib import Path

import pytest
from lth_sparse.benchmarks import curves, figures, readme, tables
from lth_sparse.benchmarks.clocks import CALL, COLD
from lth_sparse.benchmarks.compare import OVER_PRUNE, OVER_TUNED
from lth_sparse.benchmarks.providers import CHOSEN, PRUNE
from lth_sparse.benchmarks.records import Record, write
from rich.console import Console

ROOT = Path(__file__).parents[2]
HERE = {"precision": "fp32", "clock": CALL, "device": "A Chip, 2 threads", "versions": "torch 2.15", "commit": "abc"}
SPEEDS = {0.512: 0.9, 0.21: 0.8, 0.107: 1.25, 0.055: 2.0}


def step(what, speeds, provider=CHOSEN, metric=OVER_TUNED, section="layers", shape="8 to 4, batch 60", **changes):
    case = Record(section, f"{what} step", provider, shape, metric=metric, unit="times", n=11)._replace(**HERE)
    low_high = ((density, speed, 0.95 * speed, 1.05 * speed) for density, speed in speeds.items())
    rows = [case._replace(density=d, value=speed, low=low, high=high) for d, speed, low, high in low_high]
    return [row._replace(**changes) for row in rows]


def recorded():
    missing = Record("layers", "linear step", "torch 2:4", status="no GPU", note="there is none")
    return [
        *step("linear", SPEEDS),
        *step("linear", SPEEDS, metric=OVER_PRUNE),
        *step("linear", dict.fromkeys(SPEEDS, 0.5), provider=PRUNE),
        *step("lenet-300-100", dict.fromkeys(SPEEDS, 0.7), section="networks", shape="batch 60"),
        missing,
    ]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ([(0.5, 0.5), (0.1, 2.0)], math.sqrt(0.05)),  # half-way, in logarithms
        ([(0.1, 2.0), (0.5, 0.5)], math.sqrt(0.05)),
        ([(0.5, 1.2), (0.2, 0.9), (0.1, 2.0), (0.05, 4.0)], None),  # checked below: the lower crossing
        ([(0.5, 1.0), (0.1, 4.0)], 0.5),
        ([(0.5, 2.0), (0.1, 0.9)], None),
        ([(0.5, 1.1), (0.1, 2.0)], math.inf),
        ([(0.1, 1.0)], None),
        ([], None),
    ],
)
def test_crossover(line, wanted):
    found = curves.crossover(line)
    if len(line) == 4:
        assert 0.1 < found < 0.2
    else:
        assert found == (wanted if wanted is None else pytest.approx(wanted))


def test_groups_are_of_whole_steps_by_shape_and_clock_sparsest_last():
    others = [*step("linear", SPEEDS, clock=COLD), *step("linear", SPEEDS, name="linear forward")]
    found = curves.groups([*recorded(), *others, Record(status="failed")])
    assert [str(group) for group in found] == [
        "linear 8 to 4, batch 60",
        "lenet-300-100, batch 60",
        "linear 8 to 4, batch 60",
    ]
    lines = next(iter(found.values()))
    assert list(lines) == [CHOSEN, PRUNE]
    assert [record.density for record in lines[CHOSEN]] == sorted(SPEEDS, reverse=True)
    assert 0.107 < curves.winning(lines) < 0.21 and curves.winning(lines, "nobody") is None


def test_tables_show_intervals_and_name_what_is_missing():
    console = Console(width=200, markup=False, file=io.StringIO())
    for table in tables.tables(recorded()):
        console.print(table)
    text = console.file.getvalue()
    assert "1.25" in text and "1.19-1.31" in text and "faster than dense below 1" in text and "never faster" in text
    assert text.count("torch 2:4: no GPU: there is none") == 1
    assert tables.spread(Record(value=0.123, n=3)) == "n=3" and tables.short(12.34) == "12.3"


def test_figures_have_their_data_beside_them(tmp_path):
    results = tmp_path / "results"
    rows = [
        {"arm": arm, "density": density, "test_accuracy": {"mean": accuracy}}
        for arm, density, accuracy in [("ticket", 0.21, 0.98), ("ticket", 0.1, None), ("random", 0.21, 0.5)]
    ]
    (results / "run").mkdir(parents=True)
    settings = {"model": "lenet-300-100", "dataset": "mnist"}
    (results / "run" / "summary.json").write_text(json.dumps({"name": "run", "settings": settings, "rows": rows}))
    paths = figures.draw(recorded(), tmp_path / "figures", results)
    stems = {f"{section}-fp32-call-hot" for section in ("layers", "networks")}
    assert {path.name for path in paths} == {stem + kind for stem in stems for kind in (".png", ".svg", ".json")}
    assert all(path.stat().st_size > 100 for path in paths)
    (panel,) = json.loads((tmp_path / "figures" / "networks-fp32-call-hot.json").read_text())["panels"]
    assert panel["accuracy"]["points"] == [{"density": 0.21, "test_accuracy": 0.98}]
    (panel,) = json.loads((tmp_path / "figures" / "layers-fp32-call-hot.json").read_text())["panels"]
    assert panel["accuracy"] is None and panel["faster_below"] == pytest.approx(math.sqrt(0.107 * 0.21), abs=1e-4)
    assert [point["value"] for point in panel["lines"][CHOSEN]] == list(SPEEDS.values())


def test_a_figure_draws_dense_at_one_the_crossover_and_the_accuracy():
    accuracy = {"experiment": "run", "dataset": "mnist", "points": [{"density": 0.2, "test_accuracy": 0.98}]}
    data = figures.figures_data(recorded(), Path("nowhere"))["layers-fp32-call-hot"]
    data["panels"][0]["accuracy"] = accuracy
    axes, right = figures.figure(data).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines["dense, tuned"].get_ydata()) == {1}
    assert lines["crossover of ours"].get_xdata()[0] == pytest.approx(100 * math.sqrt(0.107 * 0.21), abs=0.01)
    assert [list(value) for value in right.get_lines()[0].get_data()] == [[20.0], [98.0]]
    assert axes.get_xlim()[0] > axes.get_xlim()[1]  # sparser to the right


def test_many_panels_and_no_experiments(tmp_path):
    found = [record for width in range(3) for record in step("linear", SPEEDS, shape=f"{width} to 4, batch 60")]
    (data,) = figures.figures_data(found, tmp_path).values()
    assert len(figures.figure(data).axes) == 4 and figures.accuracy("lenet-300-100", tmp_path) is None
    assert figures.draw([Record(status="failed")], tmp_path) == []


def test_the_readme_says_where_sparse_wins_and_loses():
    text = readme.performance(recorded())
    assert "On A Chip, 2 threads (torch 2.15, commit abc), n = 11 to 11 pairs" in text
    assert "| linear 8 to 4, batch 60, fp32 | tuned dense | 0.90 (0.85-0.95) | 0.80 (0.76-0.84) | 1.25" in text
    assert (
        "- linear 8 to 4, batch 60, fp32: faster than dense below 15.0% of the weights; surely slower at 51.2%, 21.0%."
        in text
    )
    assert "lenet-300-100, batch 60, fp32: never faster than dense" in text
    assert "pack" in readme.performance([Record(status="failed")])


def test_the_readme_shows_the_kernels_of_layers_on_cuda():
    cases = {"linear": ("layers", CALL), "conv2d": ("layers", COLD), "conv-6": ("networks", CALL)}
    cases["conv-2"] = ("networks", COLD)
    on_gpu = [
        step(name, SPEEDS, section=section, device="A GPU", clock=clock) for name, (section, clock) in cases.items()
    ]
    text = readme.performance([record for records in on_gpu for record in records])
    assert "conv2d" in text and "conv-6" in text and "linear" not in text and "conv-2" not in text


def test_the_part_between_the_markers_is_replaced(tmp_path):
    old = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"
    assert readme.updated(old, tmp_path) == old.replace("old", "\nNothing has been recorded yet.\n")
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / "records.jsonl", recorded())
    new = readme.updated(old, tmp_path)
    assert "A Chip" in new and new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert readme.updated(new, tmp_path) == new
    with pytest.raises(ValueError, match="lacks the lines"):
        readme.updated("no markers", tmp_path)


def test_the_readme_is_what_the_records_give():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.updated(text, ROOT / "benchmarks" / "results") == text, "run python benchmarks/readme.py"
