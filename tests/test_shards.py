"""Runs shared among processes: every arm and trial once, and the bytes of a run that nobody shared."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_folders import content, differing, tiny

from lth_sparse import experiment, recipes, report, runs, shards
from lth_sparse.cli import main
from lth_sparse.recipe import parse
from lth_sparse.shards import Shard

ARMS = ("ticket", "reinit", "random", "one-shot", "one-shot-reinit")
VARIANTS = """
[settings]
dataset = "digits"
rounds = 1
iterations = 6
evaluate_every = 3
device = "cpu"
threads = 1
arms = ["ticket", "reinit"]
[variant.first]
trials = 2
[variant.second]
lr = 0.01
trials = 2
[variant.third]
arms = ["ticket"]
tickets_of = "first"
[variant.fourth]
arms = ["ticket"]
without = "second"
"""


def one(recipe) -> recipes.Experiment:
    return recipes.Experiment("demo", "", "", (), {"": recipe})


def without_locks(run: Path) -> dict:
    return {path: value for path, value in content(run).items() if not path.endswith("lock")}


@pytest.fixture(scope="module")
def asked():
    return one(tiny(arms=ARMS, trials=2, rounds=1))


@pytest.fixture(scope="module")
def whole(asked, tmp_path_factory):
    return without_locks(experiment.run_all(asked, out=tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def variants(tmp_path):
    (tmp_path / "demo.toml").write_text(VARIANTS)
    return recipes.read(tmp_path / "demo.toml")


def test_shards_are_named():
    assert shards.parse("3/16") == Shard(3, 16) and shards.parse("1/1") == Shard(1, 1)
    assert str(Shard(3, 16)) == "shard 3/16"


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "a/4", "1/2/3", "-1/4", "1/0", "1.5/4", "/"])
def test_what_is_no_shard(text):
    with pytest.raises(ValueError, match="--shard takes one of 1/N to N/N, got"):
        shards.parse(text)


def test_ranks_of_torchrun_are_shards():
    rank = {"TORCHELASTIC_RUN_ID": "none", "RANK": "2", "WORLD_SIZE": "4"}
    assert shards.of_torchrun(rank) == Shard(3, 4)
    assert shards.of_torchrun(rank | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert shards.of_torchrun({"RANK": "2", "WORLD_SIZE": "4"}) is None  # another launcher's, or a leftover


@pytest.mark.parametrize(
    "rank, seen, there, wanted",
    [
        *[(1, None, 8, "1"), (5, None, 4, "1"), (1, None, 1, "0"), (1, None, 0, None)],
        *[(1, "4,5,6", 8, "5"), (1, "GPU-a,GPU-b", 8, "GPU-b"), (1, "7", 8, "7"), (1, "", 8, "")],
    ],
)
def test_each_rank_sees_one_device(monkeypatch, rank, seen, there, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    environment = {"LOCAL_RANK": str(rank)} | ({} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    shards.take_device(environment)
    assert environment.get("CUDA_VISIBLE_DEVICES") == wanted
    shards.take_device(alone := {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert alone == {"CUDA_VISIBLE_DEVICES": "4,5"}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("name", ["figure4", "criteria", "transfer", "idea-5-removal", "idea-8-union"])
def test_every_chain_is_dealt_once(name, count):
    asked = recipes.read(recipes.find(name))
    dealt = [shards.share(asked, Shard(index, count)) for index in range(1, count + 1)]
    chains = [(name, *chain) for share in dealt for name, given in share.items() for chain in given]
    every = {(v, a, t) for v, recipe in asked.variants.items() for a in recipe.arms for t in range(recipe.trials)}
    assert len(chains) == len(every) and set(chains) == every


def test_what_needs_one_another_stays_together(variants):
    def share(asked, count):
        dealt = [shards.share(asked, Shard(index, count)) for index in range(1, count + 1)]
        return [{name: sorted(chains) for name, chains in share.items()} for share in dealt if share]

    pairs = [("ticket", "reinit"), ("one-shot", "one-shot-reinit")]
    found = share(one(tiny(arms=("ticket", "reinit", "one-shot", "one-shot-reinit", "random"), trials=3)), 9)
    assert sorted(sum((share[""] for share in found[:6]), [])) == sorted(
        (arm, trial) for pair in pairs for arm in pair for trial in range(3)
    )
    assert all(len(share[""]) == 2 for share in found[:6]) and all(len(share[""]) == 1 for share in found[6:])
    linked = share(variants, 4)
    assert {frozenset(share) for share in linked} == {
        frozenset({"first", "third"}), frozenset({"second", "fourth"}), frozenset({"first"}), frozenset({"second"})
    }  # fmt: skip
    assert list(shards.share(variants, Shard(1, 1))) == ["first", "second", "third", "fourth"]


def test_the_largest_parts_are_dealt_first():
    asked = one(tiny(arms=("random", "ticket", "reinit", "twin"), rounds=3))
    assert sorted(shards.share(asked, Shard(1, 2))[""]) == [("reinit", 0), ("ticket", 0), ("twin", 0)]
    assert shards.share(asked, Shard(2, 2)) == {"": [("random", 0)]} and shards.share(asked, Shard(3, 3)) == {}


@pytest.mark.parametrize("count", [3, 12])
def test_one_folder_comes_to_the_bytes_of_a_run_alone(asked, whole, count, tmp_path):
    for index in range(count, 0, -1):
        assert not shards.is_done(tmp_path / "run")
        experiment.run_all(asked, out=tmp_path / "run", shard=Shard(index, count))
    assert shards.is_done(tmp_path / "run")
    assert differing(without_locks(tmp_path / "run"), whole) == []
    experiment.run_all(asked, out=tmp_path / "run")  # finds nothing to do
    assert differing(without_locks(tmp_path / "run"), whole) == []


def test_folders_merged_come_to_the_same_bytes(asked, whole, tmp_path):
    parts = [experiment.run_all(asked, out=tmp_path / f"{i}", shard=Shard(i, 3)) for i in (1, 2, 3)]
    run = shards.merge(parts[:2], tmp_path / "run")
    assert not shards.is_done(run) and not any(map(shards.is_done, parts))
    assert shards.merge([*parts, run], run) == run and shards.is_done(run)
    assert differing(without_locks(run), whole) == []


def test_variants_are_shared_and_merged(variants, tmp_path):
    whole = without_locks(experiment.run_all(variants, out=tmp_path / "whole"))
    for index in (1, 2):
        experiment.run_all(variants, out=tmp_path / "run", shard=Shard(index, 2))
        experiment.run_all(variants, out=tmp_path / f"{index}", shard=Shard(index, 2))
    assert differing(without_locks(tmp_path / "run"), whole) == []
    shards.merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    assert differing(without_locks(tmp_path / "merged"), whole) == []


def test_learned_masks_are_shared(tmp_path):
    asked = one(tiny(arms=("ticket",), trials=2, rounds=0, learn_masks=2))
    whole = without_locks(experiment.run_all(asked, out=tmp_path / "whole"))
    for index in (1, 2):
        assert not shards.is_done(tmp_path / "run")
        experiment.run_all(asked, out=tmp_path / "run", shard=Shard(index, 2))
    assert shards.is_done(tmp_path / "run") and differing(without_locks(tmp_path / "run"), whole) == []


def test_a_run_whose_ticket_collapsed_is_done(tmp_path):
    asked = one(tiny(arms=("ticket", "reinit"), rounds=5, prune_rate_fc=0.99))
    experiment.run_all(asked, out=tmp_path / "run", shard=Shard(1, 2))
    assert report.summarize(tmp_path / "run")["status"]["done"] == 6 and shards.is_done(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/reinit/trial_0/round_02")
    assert not shards.is_done(tmp_path / "run")


def test_who_may_write_at_the_same_time(asked, tmp_path):
    recipe, out = asked.variants[""].resolve(1257), tmp_path / "run"
    refused = pytest.raises(ValueError, match="another process is writing to")
    with runs.opened(recipe, "demo", out, ["ticket/trial_0"]):
        with runs.opened(recipe, "demo", out, ["ticket/trial_1", "random/trial_0"]):
            with refused, runs.opened(recipe, "demo", out, ["reinit/trial_0", "random/trial_0"]):
                pytest.fail("opened")
            with runs.opened(recipe, "demo", out, ["reinit/trial_0"]), runs.opened(recipe, "demo", out, []):
                pass
        with refused, runs.opened(recipe, "demo", out):
            pytest.fail("opened")
    with runs.opened(recipe, "demo", out), refused, runs.opened(recipe, "demo", out, ["ticket/trial_0"]):
        pytest.fail("opened")


def test_what_is_not_merged(asked, tmp_path):
    given = experiment.run_all(asked, out=tmp_path / "1", shard=Shard(1, 12))
    other = experiment.run_all(one(tiny(arms=("random",), rounds=0)), out=tmp_path / "other")
    before = content(given)
    with pytest.raises(ValueError, match=r"other was made with other settings \(rounds 0, not 1;"):
        shards.merge([given, other], tmp_path / "run")
    with pytest.raises(ValueError, match="is not a run folder"):
        shards.merge([given, tmp_path], tmp_path / "run")
    damaged = next(given.rglob("trained.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="trained.safetensors is damaged"):
        shards.merge([given], tmp_path / "run")
    assert not (tmp_path / "run").exists() and differing(content(given), before) == [str(damaged.relative_to(given))]


def test_the_last_shard_prints_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = "arms=ticket,random rounds=1 iterations=4 evaluate_every=2 dataset=digits device=cpu threads=1"
    Path("demo.toml").write_text("[settings]\n")
    command = ["run", "demo.toml", *(f"--set={each}" for each in settings.split()), "--out=run"]
    assert main([*command, "--shard=2/2"]) == 0
    said = capsys.readouterr().err
    assert "shard 2/2 is done, others of run are not yet" in said and "winning ticket" not in said
    assert main([*command, "--shard=1/2"]) == 0
    assert "winning ticket" in capsys.readouterr().err and Path("run/figures/tickets.png").exists()
    assert main(["merge", "run", "--out=merged", "--json"]) == 0
    assert '"done": 4' in capsys.readouterr().out and Path("merged/figures/tickets.png").exists()
    assert main([*command, "--shard=3/2"]) == 2 and "--shard takes one of 1/N to N/N" in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_of_torchrun_die_and_go_on(tmp_path):
    recipe = 'arms = ["ticket", "reinit", "random"]\ntrials = 2\nrounds = 2\niterations = 800\nevaluate_every = 100\n'
    (tmp_path / "demo.toml").write_text(f'[settings]\ndataset = "digits"\nthreads = 1\ndevice = "cpu"\n{recipe}')
    asked = recipes.read(tmp_path / "demo.toml")
    whole = without_locks(experiment.run_all(asked, out=tmp_path / "whole"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2"]
    given = ["-m", "lth_sparse", "run", "demo.toml", "--out=run"]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    process = subprocess.Popen(
        [*launcher, "--standalone", *given], cwd=tmp_path, env=clean, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("*/trial_*/round_*/result.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(ranks.stdout.split()[0]), signal.SIGKILL)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "winning ticket" in said and (tmp_path / "run/figures/tickets.png").exists()
    found = {path: value for path, value in without_locks(tmp_path / "run").items() if "figures" not in path}
    assert differing(found, whole) == [] and parse(asked.variants[""].settings()) == asked.variants[""]
