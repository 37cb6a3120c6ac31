"""The `lth` command: exit codes, one sentence for every error, one JSON document, and interrupts that lose nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lth_sparse import cli, data, report
from lth_sparse.checkpoint import read_tensors
from lth_sparse.cli import main

FAST = ["--device=cpu", "--threads=1", "--rounds=1", "--iterations=6", "--evaluate-every=3", "--arms=ticket,random"]
TINY = ["find-ticket", "lenet-300-100", "digits", *FAST]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test in an empty folder, with no way to download and SIGTERM as it was."""

    def no_network(source, root):
        raise OSError("no network")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "_download", no_network)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def no_figures(monkeypatch):
    """Drawing takes longer than the small runs here."""
    monkeypatch.setattr(cli.plots, "draw", lambda *arguments: [])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small run in runs/demo."""
    folder = tmp_path_factory.mktemp("made")
    assert main([*TINY, f"--out={folder / 'runs' / 'demo'}", "--quiet"]) == 0
    return folder


def sentence(capsys) -> str:
    """What was said: one line on stderr, nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("lth: ") and err.count("\n") == 1 and len(err) > 20, (out, err)
    return err


def refused(arguments, capsys) -> str:
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    assert sorted(Path().rglob("*")) == before, "something was left behind"
    return sentence(capsys)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "COMMAND"),
        (["dance"], "dance"),
        (["find-ticket"], "model"),
        (["find-ticket", "lenet-300-100"], "dataset"),
        (["find-ticket", "lenet-300-100", "digits", "data", "more"], "more"),
        (["find-ticket", "lenet-400", "digits"], "lenet-400"),
        (["find-ticket", "lenet-300-100", "nist"], "nist"),
        (["find-ticket", "vgg-19", "digits"], "16x16"),
        ([*TINY, "--wings=2"], "wings"),
        ([*TINY, "--lr"], "lr"),
        *(([*TINY, f"--{name}=best"], "best") for name in ("arms", "score", "scope", "optimizer", "device")),
        *(([*TINY, f"--{name}=best"], "best") for name in ("rounds", "lr", "seed", "rewind", "milestones")),
        ([*TINY, "--rounds", "-1"], "rounds"),
        ([*TINY, "--lr", "-1"], "lr"),
        ([*TINY, "--lr=nan"], "lr"),
        ([*TINY, "--prune-rate-fc=1"], "prune_rate_fc"),
        ([*TINY, "--batch-size=5000"], "1257"),
        ([*TINY, "--iterations=0"], "iterations"),
        ([*TINY, "--evaluate-every=7"], "evaluate_every"),
        ([*TINY, "--rewind=6"], "rewind"),
        ([*TINY, "--seed=18446744073709551616"], "seed"),
        ([*TINY, "--validation-size=1437"], "1437"),
        ([*TINY, "--precision=tf32"], "tf32"),
        (["find-ticket", "lenet-300-100", "mnist"], "missing"),
        (["run"], "--list"),
        (["run", "nope"], "nope"),
        (["run", "lenet-mnist", "--set", "rounds"], "rounds"),
        (["run", "lenet-mnist", "--set", "wings=2"], "wings"),
        (["run", "lenet-mnist", "--set", "path=2"], "path"),
        (["run", "lenet-mnist", "--set", "scale=huge"], "huge"),
        (["ls"], "runs"),
        (["report", "nowhere"], "nowhere"),
        (["plot", "nowhere"], "nowhere"),
        (["env", "--wings"], "wings"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_wrong_arguments(arguments, named, capsys):
    assert named in refused(arguments, capsys)


def test_no_cuda(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in refused([*TINY, "--device=cuda"], capsys)


def test_a_truncated_data_file_is_named(tmp_path, capsys):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in data._IDX_MD5["mnist"]:
        (raw / name).write_bytes(b"\0\0\x08\x03")
    err = refused(["find-ticket", "lenet-300-100", "mnist", "data"], capsys)
    assert "train-images-idx3-ubyte is damaged" in err and str(Path("data/MNIST/raw")) in err


def test_a_folder_of_other_settings_or_damaged(tmp_path, capsys, no_figures):
    assert main([*TINY, "--out=run", "--quiet"]) == 0
    assert "seed 0, not 1" in refused([*TINY, "--out=run", "--seed=1"], capsys)
    for name in ("round_01/ticket.safetensors", "round_01/result.json"):
        path = tmp_path / "run/ticket/trial_0" / name
        content = path.read_bytes()
        path.write_bytes(content[:50])
        assert name in refused([*TINY, "--out=run"], capsys)
        path.write_bytes(content)
    assert main([*TINY, "--out=run", "--quiet"]) == 0


def test_a_full_disk(capsys, monkeypatch, no_figures):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([*TINY, "--out=run"]) == 1
    assert "No space left on device" in sentence(capsys) and not list(Path().rglob("*.part"))
    assert main([*TINY, "--out=run", "--quiet"]) == 0
    assert main(["report", "run", "--export=run/recipe.json"]) == 2, "a path given wrong"


def test_outputs(capsys, monkeypatch):
    assert main([*TINY, "--out=run [/x]", "--json"]) == 0  # brackets are no markup
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["status"]["done"] == 4 and "winning ticket" in err and "run [/x]/figures/tickets.png" in err
    assert len(list(Path("run [/x]/figures").glob("*.png"))) == 3
    monkeypatch.setattr(cli.plots, "draw", lambda *arguments: [])
    for more, wanted in ([["--quiet", "--json"], out], [["--quiet"], ""]):
        assert main([*TINY, "--out=run [/x]", *more]) == 0
        assert capsys.readouterr() == (wanted, "")


SAVING_SOON = """
import sys
from lth_sparse import cli
from lth_sparse.training import group
group.SAVE_SECONDS = 0.1
sys.exit(cli.main())
"""


def test_interrupts(tmp_path, no_figures):
    given = ["find-ticket", "lenet-300-100", "digits", "--device=cpu", "--threads=1", "--arms=ticket", "--quiet"]
    given += ["--rounds=0", "--iterations=2000", "--evaluate-every=500"]
    command, trained = [sys.executable, "-c", SAVING_SOON, *given, "--out=run"], 0
    folder = tmp_path / "run/ticket/trial_0/round_00"
    state = folder / "training.safetensors"
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not state.exists() or read_tensors(state)[1]["iteration"] == trained:
            assert process.poll() is None
            time.sleep(0.01)
        trained = read_tensors(state)[1]["iteration"]
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 130 and out == "" and "interrupted" in err and err.count("\n") == 1, err
        assert sorted(path.name for path in folder.iterdir()) == ["strategies.json", "training.safetensors"]
        assert trained <= (trained := read_tensors(state)[1]["iteration"]) < 2000  # at once, or after a turn
    for run in ("run", "undisturbed"):
        assert main([*given, f"--out={run}"]) == 0
    for name in ("metrics.jsonl", "ticket.safetensors", "trained.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed/ticket/trial_0/round_00" / name).read_bytes()


class Parsed(Exception):
    """Raised in place of an experiment; holds its recipe and the folder of the data."""


def parsed(arguments, monkeypatch):
    def run(asked, data_dir, *more):
        raise Parsed(*asked.variants.values(), data_dir)

    monkeypatch.setattr(cli.experiment, "run_all", run)
    with pytest.raises(Parsed) as caught:
        main(arguments)
    return caught.value.args


@pytest.mark.parametrize(
    "command, iterations, lr, conv",
    [
        ("--dataset mnist --model lenet300100 --max-iteration 50000", 50_000, 1.2e-3, 0.0),
        ("--dataset cifar10 --model conv2 --max-iteration 20000", 20_000, 2e-4, 0.1),
        ("--dataset cifar10 --model conv4 --max-iteration 25000", 25_000, 3e-4, 0.1),
        ("--dataset cifar10 --model conv6 --max-iteration 30000", 30_000, 3e-4, 0.15),
    ],
)
def test_the_commands_of_the_reproduction(monkeypatch, command, iterations, lr, conv):
    command += f" --validate-each 100 --num-repetitions 1 --batch-size 60 --learning-rate {lr:g} --prune-rate-fc 0.2"
    command += f" --prune-rate-conv {conv} --val-set-size 5000"
    given, data_dir = parsed(["find-ticket", *command.split()], monkeypatch)
    found = given.resolve(45_000)
    assert (given.dataset, given.model.replace("-", "")) == tuple(command.split()[1:4:2]) and data_dir == "datasets"
    assert (found.iterations, found.lr, found.prune_rate_conv, found.prune_rate_fc) == (iterations, lr, conv, 0.2)
    assert (found.evaluate_every, found.trials, found.batch_size, found.validation_size) == (100, 1, 60, 5000)


@pytest.mark.parametrize(
    "words, where",
    [
        ("lenet-300-100 mnist ./datasets", "./datasets"),
        ("--model lenet-300-100 --dataset mnist there", "there"),
        ("--dataset mnist lenet300100 there", "there"),
        ("--rounds 2 lenet-300-100 mnist", "datasets"),
    ],
)
def test_words_of_find_ticket(monkeypatch, words, where):
    given, data_dir = parsed(["find-ticket", *words.split()], monkeypatch)
    assert (given.model, given.dataset, data_dir) == ("lenet-300-100", "mnist", where)


def test_run_reads_a_recipe(tmp_path, monkeypatch):
    given, data_dir = parsed(["run", "lenet-mnist", "there", "--set", "scale=smoke", "--set", "lr = 0.5"], monkeypatch)
    assert (given.dataset, given.rounds, given.lr, data_dir) == ("digits", 2, 0.5, "there")
    (tmp_path / "mine.toml").write_text('[settings]\nmodel = "conv2"\ndataset = "cifar10"\n')
    assert parsed(["run", "mine.toml", "--set=trials=3"], monkeypatch)[0].trials == 3


def test_run_carries_a_recipe_out(tmp_path, capsys, no_figures):
    text = (
        '[settings]\ndataset = "digits"\n[scale.small]\nrounds = 0\niterations = 4\nevaluate_every = 2\narms = "random"'
    )
    (tmp_path / "mine.toml").write_text(text + '\ndevice = "cpu"\n')
    assert main(["run", "mine.toml", "--set", "scale=small", "--json", "--quiet"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["name"] == "mine-small" and summary["winning_ticket"] is None
    assert [path.name for path in Path("runs").iterdir()] == [f"mine-small--{summary['identity']}"]


def test_figures_of_variants(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.plots, "draw", lambda summary, curves, to: [to / "a.png", to / "a.json"])
    monkeypatch.setattr(cli.report, "side_by_side", lambda *given: {})
    monkeypatch.setattr(cli.runs, "read_recipe", lambda run: {"name": "demo"})
    both, one = {"x": ({}, {}), "y": ({}, {})}, {"x": ({}, {})}

    def pictures(found, **more):
        drawn = cli._draw(Path("run"), found, Path("run/figures"), **more)
        cli._print_paths(Path("run"), drawn)
        return [str(path.parent) for path in drawn if path.suffix == ".png"], capsys.readouterr().err.splitlines()[1:]

    drawn, said = pictures(both)
    assert drawn == ["run/figures", "run/figures/x", "run/figures/y"]
    assert said == ["figure: run/figures/a.png", "figures of each variant: run/figures/NAME"]
    assert pictures(both, each=False) == (["run/figures"], ["figure: run/figures/a.png"])
    assert pictures(one) == pictures(one, each=False) == (["run/figures/x"], ["figure: run/figures/x/a.png"])
    assert pictures({"": ({}, {})}) == (["run/figures"], ["figure: run/figures/a.png"])


def test_looking_at_runs(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(made)
    assert main(["ls"]) == 0 and "runs/demo" in capsys.readouterr().err
    assert main(["ls", "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out).values()
    assert listed["status"]["done"] == listed["status"]["planned"] and set(listed) == {
        "name", "settings", "status", "winning_ticket"
    }  # fmt: skip
    summary = report.summarize(Path("runs/demo"))
    for verb, given in [("report", "runs/demo"), ("report", "de"), ("plot", "runs/demo")]:
        assert main([verb, given]) == 0
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) >= 3
        assert main([verb, given, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == summary if verb == "report" else all(Path(path).is_file() for path in found)
    assert main(["report", "runs/demo", "--export", str(tmp_path / "export")]) == 0
    assert sorted(os.listdir(tmp_path / "export")) == ["data.json", "data_random.json"]
    assert str(tmp_path / "export" / "data.json") in capsys.readouterr().err
    assert main(["report", "runs/demo", "--save", str(tmp_path / "saved")]) == 0
    assert json.loads((tmp_path / "saved" / "summary.json").read_text()) == summary
    assert {"tickets.png", "tickets.svg", "tickets.json"} <= set(os.listdir(tmp_path / "saved"))


def test_lists(capsys):
    assert main(["run", "--list"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "lenet-mnist" in err
    assert main(["run", "--list", "--json"]) == 0
    assert "lenet-mnist" in json.loads(capsys.readouterr().out)
    assert main(["env"]) == 0 and "torch" in capsys.readouterr().err
    for arguments, wanted in ([["find-ticket", "--help"], "--num-repetitions"], [["--version"], "lth-sparse 0."]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0 and wanted in capsys.readouterr().out


def test_python_m_is_the_command(capsys):
    assert main(["env", "--json"]) == 0
    out, err = capsys.readouterr()
    done = subprocess.run([sys.executable, "-m", "lth_sparse", "env", "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "") and err == ""
    assert torch.__version__.startswith(json.loads(out)["packages"]["torch"])
