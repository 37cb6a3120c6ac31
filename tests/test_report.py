"""Tables, curves and exports from result files written by hand."""

import json

import pytest

from lth_sparse import report, runs

ARMS = ["ticket", "reinit-chain", "random"]
DENSITY = [1.0, 0.5, 0.25]


def row(iteration, test, validation=0.5):
    losses = {"train_loss": 1.0, "validation_loss": 2.0 + iteration, "test_loss": 3.0 + iteration}
    return {"iteration": iteration, **losses, "validation_accuracy": validation, "test_accuracy": test}


def write(run, arm, trial, round, rows, stop=0, **more):
    folder = runs.round_folder(run, arm, trial, round)
    folder.mkdir(parents=True)
    runs.write_rows(folder / "metrics.jsonl", rows)
    kept = {"fc1": [int(1000 * DENSITY[round]), 1000]}
    content = {"arm": arm, "trial": trial, "round": round, "status": "done", "density": DENSITY[round]}
    content |= {"kept": kept}
    content |= {"early_stop": rows[stop], "final": rows[-1], "train_accuracy": 0.9 + trial / 10, "seconds": 4 * trial}
    runs.write_json(folder / "result.json", content | more)


@pytest.fixture
def run(tmp_path):
    """Two trials of three arms; trial 1's random arm diverged in round 0, its ticket collapsed after round 1."""
    folder = tmp_path / "run"
    settings = {"rounds": 2, "trials": 2, "arms": ARMS, "evaluate_every": 10, "prune_rate_fc": 0.5}
    settings |= {"model": "lenet-300-100", "dataset": "digits"}
    folder.mkdir()
    runs.write_json(folder / "recipe.json", {"name": "demo", "identity": "01234567", "settings": settings})
    runs.write_json(folder / "environment.json", {"python": "3"})
    for trial in (0, 1):
        for round in range(3 - trial):
            status = "collapsed" if (trial, round) == (1, 1) else "done"
            validation = [0.7, 0.8, 0.6][round]
            rows = [row(10, 0.2 + trial / 10, validation), row(20, 0.4 + trial / 5), row(25, 0.6 + trial / 10)]
            write(folder, "ticket", trial, round, rows, stop=trial, status=status)
    write(folder, "random", 0, 0, [row(10, 0.1), row(20, 0.2), row(25, 0.3)])
    write(folder, "random", 1, 0, [row(10, None), row(20, None)], status="diverged", train_accuracy=None)
    write(folder, "reinit-chain", 0, 1, [row(10, 0.7)])
    return folder


def test_summary(run):
    summary = report.summarize(run)
    assert (summary["name"], summary["identity"], summary["environment"]) == ("demo", "01234567", {"python": "3"})
    assert summary["settings"]["trials"] == 2
    early = ["ticket trial 1: collapsed at round 1", "random trial 1: diverged at round 0"]
    assert summary["status"] == {"done": 8, "planned": 18, "ended_early": early}
    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    assert list(rows) == [("ticket", 0), ("ticket", 1), ("ticket", 2), ("reinit-chain", 1), ("random", 0)]
    found = rows["ticket", 1]
    assert (found["n"], found["density"]) == (2, 0.5)
    assert found["early_stop_iteration"] == {"mean": 15, "min": 10, "max": 20}
    assert found["test_accuracy"] == pytest.approx({"mean": 0.4, "min": 0.2, "max": 0.6})
    assert found["validation_accuracy"] == pytest.approx({"mean": 0.65, "min": 0.5, "max": 0.8})
    assert found["final_test_accuracy"] == pytest.approx({"mean": 0.65, "min": 0.6, "max": 0.7})
    assert found["validation_loss"] == {"mean": 17, "min": 12, "max": 22}
    assert found["test_loss"] == {"mean": 18, "min": 13, "max": 23} and "zeros" not in found
    assert found["train_accuracy"] == pytest.approx({"mean": 0.95, "min": 0.9, "max": 1.0})
    assert found["seconds"] == {"mean": 2, "min": 0, "max": 4}
    assert rows["ticket", 2]["n"] == 1 and rows["ticket", 2]["test_accuracy"]["mean"] == 0.2


def test_what_is_missing_is_left_out_of_the_mean(run):
    found = {(row["arm"], row["round"]): row for row in report.summarize(run)["rows"]}["random", 0]
    assert found["n"] == 2
    assert found["test_accuracy"] == {"mean": 0.1, "min": 0.1, "max": 0.1}
    assert found["train_accuracy"] == {"mean": 0.9, "min": 0.9, "max": 0.9}
    for path in run.glob("random/*/round_00/result.json"):
        runs.write_json(path, runs.read_json(path) | {"train_accuracy": float("nan")})
    found = {(row["arm"], row["round"]): row for row in report.summarize(run)["rows"]}["random", 0]
    assert found["train_accuracy"] == {"mean": None, "min": None, "max": None}


@pytest.mark.parametrize(
    "validation, winner",
    [([0.7, 0.8, 0.6], 1), ([0.7, 0.6, 0.7], 2), ([0.7, 0.6, 0.5], 0), ([0.7], 0), ([], None)],
)
def test_the_winner_is_the_sparsest_no_worse_than_dense_on_validation(run, validation, winner):
    for path in run.glob("ticket/trial_0/*/result.json"):
        path.unlink()
    for round, accuracy in enumerate(validation):
        (run / f"ticket/trial_0/round_0{round}/metrics.jsonl").unlink()
        (run / f"ticket/trial_0/round_0{round}").rmdir()
        write(run, "ticket", 0, round, [row(10, 0.9 - round / 10, accuracy)])
    found = report.summarize(run)["winning_ticket"]
    if winner is None:
        assert found is None
    else:
        assert (found["round"], found["density"]) == (winner, DENSITY[winner])
        assert found["early_stop"]["validation_accuracy"] == validation[winner]
        assert found["dense"]["test_accuracy"] == 0.9


def test_a_ticket_that_diverged_never_wins(run):
    path = runs.round_folder(run, "ticket", 0, 1) / "result.json"
    runs.write_json(path, runs.read_json(path) | {"status": "diverged"})
    assert report.summarize(run)["winning_ticket"]["round"] == 0
    path = runs.round_folder(run, "ticket", 0, 0) / "result.json"
    runs.write_json(path, runs.read_json(path) | {"status": "diverged"})
    assert report.summarize(run)["winning_ticket"] is None


def test_curves(run):
    curves = report.curves(run)
    assert {arm: list(rounds) for arm, rounds in curves.items()} == {
        "ticket": [0, 1, 2],
        "reinit-chain": [1],
        "random": [0],
    }
    found = curves["ticket"][1]
    assert found["density"] == 0.5 and found["iteration"] == [10, 20, 25]
    assert found["test_accuracy"]["mean"] == pytest.approx([0.25, 0.5, 0.65])
    assert found["test_accuracy"]["min"] == pytest.approx([0.2, 0.4, 0.6])
    assert found["test_accuracy"]["max"] == pytest.approx([0.3, 0.6, 0.7])
    assert found["validation_accuracy"]["mean"] == [0.8, 0.5, 0.5]
    assert found["validation_loss"] == dict.fromkeys(("mean", "min", "max"), [12, 22, 27])
    assert found["test_loss"]["mean"] == [13, 23, 28] and found["train_loss"]["mean"] == [1, 1, 1]
    diverged = curves["random"][0]
    assert diverged["iteration"] == [10, 20] and diverged["test_accuracy"]["mean"] == [0.1, 0.2]


def test_curves_of_what_is_not_finite(run):
    path = runs.round_folder(run, "random", 0, 0) / "metrics.jsonl"
    rows = [row(10, 0.1), row(20, 0.2) | {"validation_loss": float("nan")}, row(25, 0.3)]
    runs.write_rows(path, rows)
    runs.write_rows(runs.round_folder(run, "random", 1, 0) / "metrics.jsonl", rows[1:])
    found = report.curves(run)["random"][0]
    assert found["validation_loss"] == {"mean": [12, 27], "min": [12, 27], "max": [12, 27]}
    runs.write_rows(runs.round_folder(run, "random", 1, 0) / "metrics.jsonl", rows)
    assert report.curves(run)["random"][0]["validation_loss"]["mean"] == [12, None, 27]


def test_export(run, tmp_path):
    paths = report.export(run, tmp_path / "deep" / "export")
    assert sorted(path.name for path in paths) == ["data.json", "data_random.json", "data_reinit.json"]
    found = json.loads((tmp_path / "deep/export/data.json").read_text())
    names = ["VALIDATION_ITERATIONS", "PRUNE_RATE", "PM_LIST", "weights_remaining_rates"]
    series = ["test_accuracies", "test_losses", "val_accuracies", "val_losses"]
    assert sorted(found) == sorted(names + series)
    assert [found[name] for name in names] == [10, 0.5, [100.0, 50.0, 25.0], [1.0, 0.5, 0.25]]
    for name in series:
        assert [[len(trial) for trial in level] for level in found[name]] == [[3, 3], [3, 3], [3]]
    assert found["test_accuracies"][1] == [[0.2, 0.4, 0.6], pytest.approx([0.3, 0.6, 0.7])]
    assert found["val_losses"][0][0] == [12, 22, 27] and found["test_losses"][0][0] == [13, 23, 28]
    assert json.loads((tmp_path / "deep/export/data_reinit.json").read_text())["test_accuracies"] == [[[0.7]]]
    assert json.loads((tmp_path / "deep/export/data_random.json").read_text())["test_accuracies"][0][1] == [None, None]


def test_data_reinit_holds_reinit_where_the_chain_was_not_run(run, tmp_path):
    settings = runs.read_json(run / "recipe.json")
    settings["settings"]["arms"] = ["ticket", "reinit", "random"]
    runs.write_json(run / "recipe.json", settings)
    (run / "reinit-chain").rename(run / "reinit")
    path = run / "reinit/trial_0/round_01/result.json"
    runs.write_json(path, runs.read_json(path) | {"arm": "reinit"})
    report.export(run, tmp_path / "export")
    assert json.loads((tmp_path / "export/data_reinit.json").read_text())["test_accuracies"] == [[[0.7]]]


def test_refusals(run, tmp_path):
    with pytest.raises(ValueError, match="not a run folder"):
        report.results(tmp_path)
    path = run / "ticket/trial_0/round_01/result.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="round_01/result.json is damaged"):
        report.summarize(run)


def test_what_only_some_results_have(run):
    changes = {
        "ticket/trial_0/round_00": {"untrained_accuracy": 0.1, "sign_changes": {"fc1": 0.2}, "dead_units": {"fc1": 3}},
        "ticket/trial_1/round_00": {"untrained_accuracy": 0.3, "sign_changes": {"fc1": 0.4}, "dead_units": {"fc1": 6}},
        "ticket/trial_0/round_01": {"untrained_accuracy": 0.6, "barrier": 0.5, "joules": 7.0},
        "ticket/trial_1/round_01": {"untrained_accuracy": 0.4, "barrier": None, "zeros": 0.5},
    }
    for path, more in changes.items():
        runs.write_json(run / path / "result.json", runs.read_json(run / path / "result.json") | more)
    rows = {(row["arm"], row["round"]): row for row in report.summarize(run)["rows"]}
    first, second = rows["ticket", 0], rows["ticket", 1]
    assert first["untrained_accuracy"] == pytest.approx({"mean": 0.2, "min": 0.1, "max": 0.3})
    assert first["sign_changes"] == pytest.approx({"fc1": 0.3}) and first["dead_units"] == {"fc1": 4.5}
    assert second["barrier"] == {"mean": 0.5, "min": 0.5, "max": 0.5} and second["joules"]["mean"] == 7
    assert second["zeros"] == {"mean": 0.5, "min": 0.5, "max": 0.5}
    assert not {"untrained_accuracy", "sign_changes", "barrier"} & set(rows["random", 0]) and first["weights"] == 1000
    for name, accuracies in {"learned": [0.5, 0.7], "learned-rescaled": [0.9]}.items():
        for trial, accuracy in enumerate(accuracies):
            folder = runs.round_folder(run, name, trial, 0)
            folder.mkdir(parents=True)
            runs.write_json(folder / "mask.json", {"mask": name, "test_accuracy": accuracy})
    found = report.summarize(run)
    best = {"mean": 0.5, "min": 0.4, "max": 0.6}  # of the levels, by the mean
    assert found["n"] == 2 and list(found["supermasks"]) == ["magnitude", "learned", "learned-rescaled"]
    assert found["supermasks"]["magnitude"] == pytest.approx(best)
    assert found["supermasks"]["learned"] == pytest.approx({"mean": 0.6, "min": 0.5, "max": 0.7})
    assert len(report.results(run)) == 8, "a mask is no round"


def test_variants(run, tmp_path):
    assert report.variants(run) == {"": run}
    whole = tmp_path / "whole"
    whole.mkdir()
    runs.write_json(whole / "recipe.json", {"name": "demo", "variants": ["b", "a", "unborn"]})
    for name in ("a", "b", "stranger"):
        run.rename(whole / name) if name == "a" else (whole / name).mkdir()
    runs.write_json(whole / "b" / "recipe.json", {})
    runs.write_json(whole / "stranger" / "recipe.json", {})
    assert list(report.variants(whole).items()) == [("b", whole / "b"), ("a", whole / "a")]
    with pytest.raises(ValueError, match="is not a run folder"):
        report.variants(tmp_path)


def test_side_by_side(run):
    slow = report.summarize(run)
    fast = slow | {"settings": slow["settings"] | {"arms": ["random", "ticket"]}, "name": "other"}
    found = report.side_by_side("demo", {"slow": slow, "fast": fast})
    assert [(row["arm"], row["round"]) for row in found["rows"]] == [("slow", 0), ("slow", 1), ("slow", 2), ("fast", 0)]
    assert found["rows"][3]["test_accuracy"]["mean"] == 0.1
    assert (found["name"], found["title"]) == ("demo", "demo: the arm ticket of each variant")
    assert {row["arm"] for row in slow["rows"]} == set(ARMS), "the summaries stay as they are"


def test_saved(tmp_path):
    recipe = tmp_path / "demo.toml"
    assert report.saved(recipe) == "-"
    for name, status in {"a": (2, 6), "b": (3, 3), ".": (1, 1)}.items():
        folder = tmp_path / "results" / "demo" / name
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_json(folder / "summary.json", {"status": dict(zip(("done", "planned"), status, strict=True))})
    assert report.saved(recipe) == "6 of 10 rounds" and report.saved(tmp_path / "other.toml") == "-"
