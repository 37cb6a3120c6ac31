"""A recipe in its run folder: what it writes, and that kills, full disks and damage cost nothing but time."""

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
import sys

import pytest
import run_folders
import torch
from run_folders import TINY, content, differing

import lth_sparse as lth
from lth_sparse import checkpoint, experiment, lottery, models, recipes, report, runs, training
from lth_sparse.masks import masked_weights
from lth_sparse.recipe import Recipe
from lth_sparse.training import group
from lth_sparse.training.network import Network

ARMS = ("ticket", "reinit", "reinit-chain", "random")


def tiny(**given) -> Recipe:
    return run_folders.tiny(**{"arms": ARMS} | given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    return experiment.run(tiny(), out=tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A run that stopped in the middle of round 1, its state saved."""
    advance = group.Group._advance

    def advancing(self):
        if self.iteration == 8 and "round_01" in self.tickets[0].label:
            raise RuntimeError("stop")
        advance(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(group, "SAVE_SECONDS", -1.0)
        patch.setattr(group, "STEPS", 1)
        patch.setattr(group.Group, "_advance", advancing)
        experiment.run(tiny(arms=("ticket",)), out=tmp_path / "run")
    return tmp_path / "run"


def test_files(whole):
    found = content(whole)
    rounds = [f"{arm}/trial_0/round_{round:02d}" for arm in ARMS for round in range(3)]
    names = ("metrics.jsonl", "result.json", "ticket.safetensors", "trained.safetensors")
    wanted = {f"{round}/{name}" for round in rounds for name in names}
    wanted |= {"recipe.json", "environment.json", "lock", "common.lock", "summary.json", "winning_ticket.safetensors"}
    assert set(found) == wanted | {"ticket/trial_0/rewind.safetensors"}
    assert found["summary.json"]["status"] == {"done": 12, "planned": 12, "ended_early": []}


def test_result(whole):
    result = json.loads((whole / "ticket/trial_0/round_02/result.json").read_text())
    rows = runs.read_rows(whole / "ticket/trial_0/round_02/metrics.jsonl")
    assert [row["iteration"] for row in rows] == [5, 10, 12]
    assert result["final"] == rows[-1]
    assert result["early_stop"] == min(rows, key=lambda row: row["validation_loss"])
    kept = {"fc1": [12288, 19200], "fc2": [19200, 30000], "output": [810, 1000]}  # 0.8 * 0.8, the output 0.9 * 0.9
    assert result["kept"] == kept and result["density"] == sum(k for k, _ in kept.values()) / 50200
    names = {"arm": "ticket", "trial": 0, "round": 2, "status": "done", "precision": "fp32", "iterations": 12}
    assert {key: result[key] for key in names} == names
    assert 0 <= result["train_accuracy"] <= 1 and result["seconds"] > 0
    assert result["group"] == 1 and result["strategies"] == dict.fromkeys(kept, "masked")
    assert result["captured"] == "there is no CUDA device"


def test_trained_weights_are_those_of_the_early_stop(whole):
    data = experiment.data.load("digits")
    for arm in ARMS:
        folder = whole / arm / "trial_0" / "round_01"
        model = lth.load_(models.build("lenet-300-100", (1, 8, 8)), folder / "trained.safetensors")
        stop = runs.read_json(folder / "result.json")["early_stop"]
        loss, accuracy = Network([model], data, tiny(), {}).evaluate(data.test)[0].tolist()
        assert (loss, accuracy) == pytest.approx((stop["test_loss"], stop["test_accuracy"]), rel=1e-6)
        masks = lth.load_(models.build("lenet-300-100", (1, 8, 8)), folder / "ticket.safetensors")
        pairs = zip(masked_weights(model), masked_weights(masks), strict=True)
        assert all(torch.equal(a.mask, b.mask) for a, b in pairs)


UNSTABLE = dict(iterations="60", evaluate_every="20", lr=0.02, rounds=1)  # the dense network is best before the end


def test_final_weights_are_kept_where_the_score_compares_them_with_the_best(tmp_path):
    run = experiment.run(tiny(arms=("ticket", "stability"), **UNSTABLE), out=tmp_path / "run")
    data, folders = experiment.data.load("digits"), [runs.round_folder(run, "stability", 0, round) for round in (0, 1)]
    assert sorted(run.rglob("final.safetensors")) == [folder / "final.safetensors" for folder in folders]
    for folder, density in zip(folders, (1, 0.802), strict=True):
        result = runs.read_json(folder / "result.json")
        model = lth.load_(models.build("lenet-300-100", (1, 8, 8)), folder / "final.safetensors")
        assert lth.density(model) == result["density"] == pytest.approx(density, abs=1e-4), "it is not pruned yet"
        measured = Network([model], data, tiny(), {}).evaluate(data.test)[0].tolist()
        assert measured == pytest.approx([result["final"]["test_loss"], result["final"]["test_accuracy"]], rel=1e-6)
    best, final = (
        checkpoint.read_ticket(folders[0] / f"{name}.safetensors")[0]["fc1.weight"] for name in ("trained", "final")
    )
    kept, moved = checkpoint.read_ticket(folders[1] / "ticket.safetensors")[1]["fc1.weight"], (best - final).abs()
    assert 0 < moved[kept].max() <= moved[~kept].min(), "what the files hold is what was compared"
    alone = experiment.run(tiny(arms=("ticket",), score="stability", **UNSTABLE), out=tmp_path / "alone")
    for folder in folders:
        path = alone / "ticket" / "trial_0" / folder.name / "final.safetensors"
        assert path.read_bytes() == (folder / "final.safetensors").read_bytes()


@pytest.mark.parametrize("rewind", ["0", "3"])
def test_winning_ticket(whole, tmp_path, rewind):
    run = whole if rewind == "3" else experiment.run(tiny(arms=("ticket",), rewind="0"), out=tmp_path / "run")
    winner = report.summarize(run)["winning_ticket"]
    model = lth.load_(models.build("lenet-300-100", (1, 8, 8)), run / "winning_ticket.safetensors")
    masks = lth.sparsify_(models.build("lenet-300-100", (1, 8, 8)))
    lth.load_(masks, run / f"ticket/trial_0/round_{winner['round']:02d}/ticket.safetensors")
    if rewind == "3":
        start = checkpoint.read_tensors(run / "ticket/trial_0/rewind.safetensors")[0]
    else:
        chain = lottery.Chain(lth.sparsify_(models.build("lenet-300-100", (1, 8, 8))), seed=0)
        start = lth.snapshot(chain.prepare(0).model) if chain.is_ready(0) else None
    assert 0 < winner["round"] <= 2 and lth.density(model) == winner["density"] < 1
    for weight, other in zip(masked_weights(model), masked_weights(masks), strict=True):
        assert torch.equal(weight.mask, other.mask)
        assert torch.equal(weight.parameter, start[f"{weight.name}.weight"] * weight.mask)
    assert torch.equal(model.fc1.bias, start["fc1.bias"]) and model.fc1.bias.any() == (rewind == "3")


def test_a_finished_run_trains_nothing(whole, monkeypatch):
    before, seen = content(whole), []
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("round_*/*")}
    monkeypatch.setattr(training, "train", None)
    assert experiment.run(tiny(), out=whole, on_round=seen.append) == whole
    assert content(whole) == before and len(seen) == 12 and len(times) == 48
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("round_*/*")} == times


def test_what_a_kill_leaves_is_cleared(stopped):
    finished, current = (stopped / f"ticket/trial_0/round_0{round}" for round in (0, 1))
    (finished / "training.safetensors").write_bytes(b"killed before it was deleted")
    (current / "training.safetensors.part").write_bytes(b"killed in the middle of writing")
    experiment.run(tiny(arms=("ticket",)), out=stopped)
    assert len(list(stopped.rglob("result.json"))) == 3
    assert not list(stopped.rglob("training.safetensors*"))


def test_masks_that_are_missing_are_named(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "ticket/trial_0/round_02")
    with pytest.raises(
        ValueError, match="ticket/trial_0/round_02/ticket.safetensors is missing: without result.json of"
    ):
        experiment.run(tiny(), out=run)
    (run / "ticket/trial_0/round_01/result.json").unlink()
    assert differing(content(experiment.run(tiny(), out=run)), content(whole)) == []


def test_trials_and_metrics(tmp_path):
    rows = []
    recipe = tiny(arms=("reinit", "ticket"), trials=2, rounds=1, rewind="0")
    run = experiment.run(recipe, out=tmp_path / "run", on_metrics=lambda label, row: rows.append((label, row)))
    labels = {f"{arm}/trial_{trial}/round_{r:02d}" for arm in ("ticket", "reinit") for trial in (0, 1) for r in (0, 1)}
    assert {label for label, _ in rows} == labels and all(row["of"] == 12 for _, row in rows)
    assert [(row["arm"], row["n"]) for row in report.summarize(run)["rows"]] == [("reinit", 2)] * 2 + [
        ("ticket", 2)
    ] * 2
    for trial in ("trial_0", "trial_1"):
        masks, values = (
            [(run / arm / trial / "round_01" / name).read_bytes() for arm in ("reinit", "ticket")]
            for name in ("ticket.safetensors", "trained.safetensors")
        )
        assert masks[0] == masks[1] and values[0] != values[1]
    histories = [path.read_bytes() for path in run.rglob("metrics.jsonl")]
    assert len(set(histories)) == len(histories) == 8


def test_collapse_is_recorded(tmp_path):
    run = experiment.run(tiny(arms=("ticket", "reinit"), rounds=5, prune_rate_fc=0.99), out=tmp_path / "run")
    summary = report.summarize(run)
    assert summary["status"]["ended_early"] == ["ticket trial 0: collapsed at round 2"]
    assert summary["status"]["done"] == 6 and summary["status"]["planned"] == 12
    again = content(run)
    assert content(experiment.run(tiny(arms=("ticket", "reinit"), rounds=5, prune_rate_fc=0.99), out=run)) == again
    assert not list(run.rglob("round_03"))


def test_divergence_is_recorded(tmp_path):
    recipe = tiny(arms=("ticket", "random"), optimizer="sgd", lr=1e20, iterations="30")
    run = experiment.run(recipe, out=tmp_path / "run")
    assert len(report.summarize(run)["status"]["ended_early"]) == 2
    assert b"null" in (run / "ticket/trial_0/round_00/metrics.jsonl").read_bytes()
    again = content(run)
    assert content(experiment.run(recipe, out=run)) == again


@pytest.mark.parametrize("wrong", [{"model": "vgg-19"}, {"model": "resnet-18", "activation": "tanh"}, {"rewind": "12"}])
def test_what_does_not_fit_leaves_no_folder(tmp_path, wrong):
    with pytest.raises(ValueError):
        experiment.run(tiny(**wrong), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_global_scope_takes_the_rate_of_what_there_is(tmp_path):
    run = experiment.run(tiny(scope="global", prune_rate_conv=0.9, arms=("ticket",), rounds=1), out=tmp_path / "run")
    assert runs.read_json(run / "ticket/trial_0/round_01/result.json")["density"] == pytest.approx(0.8, abs=1e-5)


@pytest.mark.parametrize("density, rounds", [(0.2, 2), (0.05, 3)])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_final_density(density, rounds, scope):
    asked = dict(final_density=density, rounds=rounds, scope=scope, exclude=("fc2",), arms=("ticket",))
    recipe = tiny(**asked).resolve(1257)
    (chain,) = experiment.chains(recipe, experiment.data.load("digits"))
    lottery.search([chain], lambda tickets: [training.Result() for _ in tickets], rounds, lambda *_: None)
    kept = {name: int(mask.sum()) for name, mask in chain.masks[rounds].items()}
    assert kept["fc2"] == 30_000, "excluded"
    if scope == "global":
        assert kept["fc1"] + kept["output"] == pytest.approx(density * 20_200, abs=1)
    else:  # the output at the same rate as the others
        assert kept["fc1"] == pytest.approx(density * 19_200, abs=1) and kept["output"] == round(density * 1000)


def test_layers_left_out(tmp_path):
    loaded = experiment.data.load("digits")
    patterns = experiment.chains(tiny(exclude=("fc*",), arms=("ticket",)).resolve(1257), loaded)[0].pruning["rates"]
    assert patterns == {"fc1": 0, "fc2": 0, "output": 0.1}
    for wrong, words in {("fc*", "output"): "exclude names every layer, fc1, fc2, output", ("conv1",): "conv1"}.items():
        with pytest.raises(ValueError, match=words.replace("*", ".")):
            experiment.run(tiny(exclude=wrong), out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_the_first_round_may_be_longer(tmp_path):
    seen = []
    recipe = tiny(arms=("ticket",), rounds=1, iterations="4", first_iterations="9", evaluate_every="3")
    run = experiment.run(recipe, out=tmp_path / "run", on_metrics=lambda label, row: seen.append((label[-2:], row)))
    assert [(r, row["iteration"], row["of"]) for r, row in seen] == [("00", i, 9) for i in (3, 6, 9)] + [("01", 4, 4)]
    results = [runs.read_json(run / f"ticket/trial_0/round_0{round}/result.json") for round in (0, 1)]
    assert [result["iterations"] for result in results] == [9, 4]


VARIANTS = """
claims = ["LN1"]
source = "here"
[settings]
dataset = "digits"
rounds = 1
iterations = 4
evaluate_every = 2
arms = ["ticket"]
device = "cpu"
threads = 1
[variant.first]
[variant.second]
tickets_of = "first"
lr = 0.01
"""


def test_variants_have_a_folder_each(tmp_path):
    (tmp_path / "demo.toml").write_text(VARIANTS)
    asked, called = recipes.read(tmp_path / "demo.toml"), []

    def variant(name, recipe):
        called.append((name, recipe))
        return {"on_round": lambda result: called.append((name, result["round"]))}

    run = experiment.run_all(asked, out=tmp_path / "run", variant=variant)
    assert [name for name, _ in called] == ["first"] * 3 + ["second"] * 3 and called[0][1] == asked.variants["first"]
    about = runs.read_json(run / "recipe.json")
    assert (about["source"], about["claims"], about["variants"]) == ("here", ["LN1"], ["first", "second"])
    assert about["settings"] == runs.plain(asked.settings())
    masks = [(run / name / "ticket/trial_0/round_01/ticket.safetensors").read_bytes() for name in asked.variants]
    ends = [(run / name / "ticket/trial_0/round_00/trained.safetensors").read_bytes() for name in asked.variants]
    assert masks[0] == masks[1] and ends[0] != ends[1]
    before = content(run)
    assert content(experiment.run_all(asked, out=run)) == before
    longer = recipes.read(tmp_path / "demo.toml", None, arms="ticket,reinit")
    with pytest.raises(ValueError, match="other settings"):
        experiment.run_all(longer, out=run)
    seen = []
    more = experiment.run_all(
        longer,
        out=tmp_path / "more",
        variant=lambda name, _: {"on_metrics": lambda label, row: seen.append((name, label.split("/")[0]))},
        reuse=[run],
    )
    at_once = content(experiment.run_all(longer, out=tmp_path / "at once"))
    assert differing(content(more), at_once) == [] and set(seen) == {("first", "reinit"), ("second", "reinit")}


# Forks a sitting for each line it reads: how much of an undisturbed one, the first, it may last, and what to run.
SERVER = """
import json, os, pathlib, signal, sys, time
from sklearn.datasets import load_digits
from lth_sparse import experiment, recipe
from lth_sparse.training import group
group.SAVE_SECONDS = 0.01
for line in sys.stdin:
    part, out, settings = json.loads(line)
    begin, pid = time.monotonic(), os.fork()
    if not pid:
        experiment.run(recipe.parse(settings), out=pathlib.Path(out))
        os._exit(0)
    if part:
        time.sleep(part * length)
        os.kill(pid, signal.SIGKILL)
    print(os.waitpid(pid, 0)[1], flush=True)
    length = length if part else time.monotonic() - begin
"""


def check_kills(folder, settings, parts):
    sittings = [(0, "whole"), *((part, "killed") for part in parts), (0, "killed")]
    lines = [json.dumps([part, str(folder / out), settings]) + "\n" for part, out in sittings]
    command = [sys.executable, "-c", SERVER]
    done = subprocess.run(command, input="".join(lines), capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["0", *["9"] * len(parts), "0"], done.stderr
    assert content(folder / "killed") == content(folder / "whole")


def test_two_kills(tmp_path):
    check_kills(tmp_path, TINY | {"arms": ARMS}, [0.3, 0.5])


@pytest.mark.slow
@pytest.mark.parametrize("rewind", ["0", "40"])
def test_ten_kills(tmp_path, rewind):
    draw = random.Random(int(rewind))
    settings = TINY | {"arms": ARMS, "iterations": "100", "rewind": rewind}
    check_kills(tmp_path, settings, [draw.uniform(0.02, 0.16) for _ in range(10)])


@pytest.mark.parametrize(
    "call, last, saving",
    [
        *(("replace", last, 30.0) for last in (0, 1, 2, 11, 57, 58)),
        *(("fsync", last, 30.0) for last in (40,)),
        *((call, last, 0.0) for call, last in (("replace", 20), ("fsync", 60))),
    ],
)
def test_full_disk(whole, tmp_path, monkeypatch, call, last, saving):
    run, wanted, calls, real = tmp_path / "run", content(whole), [], getattr(os, call)
    monkeypatch.setattr(group, "SAVE_SECONDS", saving)

    def full(*arguments):
        calls.append(1)
        if len(calls) > last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(OSError) as caught:
        patch.setattr(os, call, full)
        experiment.run(tiny(), out=run)
    assert caught.value.errno == errno.ENOSPC
    left = content(run)
    assert not [name for name in left if name.endswith(".part")]
    under_way = ("training.safetensors", "strategies.json")
    assert all(left[name] == wanted[name] for name in left if not name.endswith(under_way))
    assert content(experiment.run(tiny(), out=run)) == wanted


ONCE = ("ticket", "one-shot", "one-shot-reinit")
CARRIED = ("freeze", "freeze-zero-toward-all", "keep", "lr-rewind", "redraw")
FOLLOWING = ("ticket", "sibling", "union", "twin", "constant-sign")
SCORED = ("snip-at-start", "synflow-at-start", "units", "stability")
SHORT = dict(iterations="4", evaluate_every="2")
LEARNING = dict(first_iterations="6", final_density=0.2, exclude=("output",), learn_masks=2)
NOISY = dict(perturbation=0.5, batch_size=1000)  # of 1,257 images: noise before the third and the fourth step


@pytest.mark.parametrize(
    "room, saving, settings",
    [
        *((room, 30.0, {"arms": ONCE, "rewind": rewind}) for room, rewind in [(9, "0"), (13, "3")]),
        *((room, 30.0, {"arms": CARRIED, "rewind": rewind}) for room, rewind in [(17, "0"), (12, "3")]),
        *((room, 30.0, {"arms": FOLLOWING, "rewind": rewind}) for room, rewind in [(13, "0"), (16, "3")]),
        *((room, 30.0, {"arms": SCORED, "rewind": rewind}) for room, rewind in [(11, "0"), (14, "3")]),
        (5, -1.0, {"arms": ("ticket",), "model": "conv-2", "dropout": 0.5, "rounds": 1}),
        (5, -1.0, {"arms": ("ticket",), "loss": "squared-error", "optimizer": "radam", "untrained": 1}),
        (5, -1.0, {"arms": ("ticket", "redraw"), "rounds": 1, **NOISY}),
        (9, -1.0, {"arms": ("ticket", "one-shot"), **LEARNING}),
        (9, -1.0, {"arms": ("ticket", "stability"), **UNSTABLE}),
        (8, 30.0, {"arms": ("ticket", "reinit", "twin"), "tickets_of": "WHOLE", "rewind": "0"}),
        (8, 30.0, {"arms": ("ticket", "keep"), "without": "WHOLE"}),
    ],
    ids=str,
)
def test_a_disk_that_is_full_again_and_again(whole, tmp_path, monkeypatch, room, saving, settings):
    """Each sitting has room for `room` files more, and in the end nobody can tell."""
    recipe = tiny(**SHORT | {name: str(whole) if value == "WHOLE" else value for name, value in settings.items()})
    monkeypatch.setattr(os, "fsync", lambda file: None)
    wanted = content(experiment.run(recipe, out=tmp_path / "undisturbed"))
    assert wanted["summary.json"]["status"]["done"] == wanted["summary.json"]["status"]["planned"]
    monkeypatch.setattr(group, "SAVE_SECONDS", saving)
    monkeypatch.setattr(group, "STEPS", 1)
    replace, left, sittings = os.replace, [], 0

    def full(*arguments):
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        left.pop()
        return replace(*arguments)

    monkeypatch.setattr(os, "replace", full)
    while "summary.json" not in (found := content(tmp_path / "run")):
        left[:], sittings = [None] * room, sittings + 1
        with contextlib.suppress(OSError):
            experiment.run(recipe, out=tmp_path / "run")
    assert differing(found, wanted) == [] and 3 < sittings < 40


@pytest.mark.parametrize("size", [0, 0.5])
@pytest.mark.parametrize(
    "name",
    [
        "recipe.json",
        "environment.json",
        "ticket/trial_0/rewind.safetensors",
        "ticket/trial_0/round_00/result.json",
        "ticket/trial_0/round_00/ticket.safetensors",
        "ticket/trial_0/round_01/training.safetensors",
        "ticket/trial_0/round_01/ticket.safetensors",
    ],
)
def test_damaged_files_are_named(stopped, name, size):
    before = (stopped / name).read_bytes()
    (stopped / name).write_bytes(before[: int(size * len(before))])
    with pytest.raises(ValueError, match=name.rpartition("/")[2]) as caught:
        experiment.run(tiny(arms=("ticket",)), out=stopped)
    assert "\n" not in str(caught.value) and "damaged" in str(caught.value)
    (stopped / name).write_bytes(before)
    summary = report.summarize(experiment.run(tiny(arms=("ticket",)), out=stopped))
    assert summary["status"]["done"] == 3


def test_a_missing_ticket_is_named(stopped):
    (stopped / "ticket/trial_0/round_00/ticket.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="round_00/ticket.safetensors"):
        experiment.run(tiny(arms=("ticket",)), out=stopped)
