"""Run folders: one recipe, one writer, and files that are whole or not there."""

import json
import math
import os

import pytest

from lth_sparse import runs
from lth_sparse.recipe import Recipe


def tiny(**given) -> Recipe:
    given = dict(iterations="20", evaluate_every="10", device="cpu", threads=1) | given
    return Recipe(dataset="digits", **given).resolve(1257)


def test_a_folder_is_made_and_opened_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with runs.opened(tiny(), "demo") as folder:
        assert str(folder) == f"runs/demo--{tiny().identity()}"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert (recipe["name"], recipe["identity"]) == ("demo", tiny().identity())
    assert Recipe(**recipe["settings"]).identity() == tiny().identity()
    written = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    with runs.opened(tiny(), "demo") as again:
        assert again == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")} == written
    with runs.opened(tiny(), "other", tmp_path / "elsewhere"):
        assert sorted(os.listdir("elsewhere")) == ["common.lock", "environment.json", "lock", "recipe.json"]


def test_other_settings_are_refused(tmp_path):
    with runs.opened(tiny(), "demo", tmp_path / "run"):
        pass
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    message = r"run was made with other settings \(lr 0.0012, not 0.5; seed 0, not 3\)"
    with pytest.raises(ValueError, match=message), runs.opened(tiny(lr=0.5, seed=3), "demo", tmp_path / "run"):
        pytest.fail("opened")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("made", ["file", "foreign", "hidden"])
def test_what_is_not_ours_is_left_alone(tmp_path, made):
    run = tmp_path / "run"
    if made == "file":
        run.write_text("mine")
    else:
        run.mkdir()
        (run / {"foreign": "thesis.tex", "hidden": ".git"}[made]).write_text("mine")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="run"), runs.opened(tiny(), "demo", run):
        pytest.fail("opened")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("left", [[], ["common.lock"], ["lock", "environment.json"], ["lock", "environment.json.part"]])
def test_a_folder_whose_making_was_interrupted_is_ours(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("{")
    with runs.opened(tiny(), "demo", tmp_path / "run") as folder:
        assert runs.read_json(folder / "environment.json") == runs.plain(runs.environment())


def test_one_writer_at_a_time(tmp_path):
    with runs.opened(tiny(), "demo", tmp_path / "run"):
        for _ in range(2):
            second = runs.opened(tiny(), "demo", tmp_path / "run")
            with pytest.raises(ValueError, match="another process is writing to"), second:
                pytest.fail("opened")
    with pytest.raises(KeyError), runs.opened(tiny(), "demo", tmp_path / "run"):
        raise KeyError
    with runs.opened(tiny(), "demo", tmp_path / "run"):
        pass


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch, call):
    path = tmp_path / "result.json"
    runs.write_json(path, {"a": 1})

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, call, fail)
        runs.write_json(path, {"a": 2})
    assert runs.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["result.json"]
    runs.write_json(path, {"a": 3})
    assert runs.read_json(path) == {"a": 3} and os.listdir(tmp_path) == ["result.json"]


def test_what_is_not_finite_becomes_null(tmp_path):
    content = {"a": math.nan, "b": [math.inf, 1.5, (-math.inf, 2)], "c": {"d": None, "e": True}}
    runs.write_json(tmp_path / "a.json", content)
    assert runs.read_json(tmp_path / "a.json") == {"a": None, "b": [None, 1.5, [None, 2]], "c": {"d": None, "e": True}}
    runs.write_rows(tmp_path / "a.jsonl", [{"a": math.nan}, {"a": 1}])
    assert (tmp_path / "a.jsonl").read_text() == '{"a": null}\n{"a": 1}\n'
    assert runs.read_rows(tmp_path / "a.jsonl") == [{"a": None}, {"a": 1}]


@pytest.mark.parametrize("text", [b"", b'{"a": 1', b"[1]", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "result.json").write_bytes(text)
    with pytest.raises(ValueError, match="result.json is damaged"):
        runs.read_json(tmp_path / "result.json")
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        runs.read_rows(tmp_path / "metrics.jsonl")


def test_environment():
    found = runs.environment()
    assert set(found) == {"python", "platform", "processor", "cores", "cuda", "energy", "packages"}
    assert set(found["packages"]) == {"lth-sparse", "torch", "torchvision", "triton", "numpy"}
    assert found["packages"]["torch"] and found["cores"] >= 1 and json.dumps(found)
    assert found["energy"] == "measured by NVML" or found["energy"].startswith("not measured: ")


def test_round_folder(tmp_path):
    assert runs.round_folder(tmp_path, "reinit", 1, 3) == tmp_path / "reinit" / "trial_1" / "round_03"
