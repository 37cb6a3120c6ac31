"""What a run takes from another: finished rounds, tickets, and a network without its winning ticket."""

import shutil

import pytest
import torch
from run_folders import content, differing, tiny

import lth_sparse as lth
from lth_sparse import across, checkpoint, experiment, lottery, models, recipes, report, runs, training
from lth_sparse.arms import ARMS
from lth_sparse.masks import get_masks

SHORT = dict(iterations="4", evaluate_every="2", rewind="3", rounds=1)
MADE = ("ticket", "one-shot", "snip-at-start", "redraw", "constant-sign")


def short(**given):
    return tiny(**SHORT | {"arms": ("ticket",)} | given)


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError, which is one sentence."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(".")
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of two rounds after the dense one."""
    return experiment.run(short(arms=MADE, rounds=2), out=tmp_path_factory.mktemp("source") / "run")


def trained(monkeypatch, recipe, **more):
    """Run the recipe; its folder, and the labels of what was trained."""
    labels, train = [], training.train

    def training_of(tickets, *arguments):
        labels.extend(ticket.label for ticket in tickets)
        return train(tickets, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train", training_of)
        return experiment.run(recipe, **more), labels


@pytest.mark.parametrize(
    "changes, again",
    [
        ({"rounds": 2}, set()),
        ({"rounds": 1}, set()),
        ({"rounds": 2, "arms": (*MADE, "twin", "keep")}, {"twin", "keep"}),
        ({"rounds": 2, "arms": ("ticket", "one-shot"), "trials": 2}, {"trial_1"}),
        ({"rounds": 3}, {"round_02", "round_03", "one-shot", "snip-at-start"}),
        ({"rounds": 3, "arms": ("redraw", "ticket", "reinit")}, {"round_02", "round_03", "reinit"}),
    ],
    ids=str,
)
def test_a_run_that_goes_on_from_another_has_the_bytes_of_one_made_at_once(
    source, tmp_path, monkeypatch, changes, again
):
    recipe = short(**{"arms": MADE} | changes)
    before = content(source)
    wanted, every = trained(monkeypatch, recipe, out=tmp_path / "at once")
    run, labels = trained(monkeypatch, recipe, out=tmp_path / "extended", reuse=[source])
    found, wanted = content(run), content(wanted)
    assert differing(found, wanted) == []
    assert found["summary.json"]["status"]["done"] == found["summary.json"]["status"]["planned"]
    assert all(any(part in again for part in label.split("/")) for label in labels), labels
    assert set(again) <= {part for label in labels for part in label.split("/")} and (not again or labels)
    assert content(source) == before, "it is only read"
    assert trained(monkeypatch, recipe, out=run, reuse=[source])[1] == [] and content(run) == found


@pytest.mark.parametrize("arms", [MADE, ("ticket", "reinit")])
def test_an_interrupted_run_is_gone_on_from_elsewhere(source, tmp_path, monkeypatch, arms):
    recipe = short(arms=MADE, rounds=3) if arms == MADE else short(arms=arms, rounds=3)
    wanted = content(experiment.run(recipe, out=tmp_path / "at once"))
    take, taken = lottery.take_round, []

    def stop(chains, train, round, *more):
        if round == 2:
            raise KeyboardInterrupt
        taken.append(round)
        take(chains, train, round, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lottery, "take_round", stop)
        experiment.run(recipe, out=tmp_path / "stopped")
    run, labels = trained(monkeypatch, recipe, out=tmp_path / "elsewhere", reuse=[tmp_path / "stopped"])
    assert differing(content(run), wanted) == [] and taken == [0, 1]
    own = {label for label in labels if not ARMS[label.split("/")[0]].masks_of}
    assert own and not [label for label in own if label[-2:] < "02"]


def test_what_was_half_copied_is_copied_again(source, tmp_path, monkeypatch):
    recipe = short(arms=("ticket",), rounds=2)
    wanted = content(experiment.run(recipe, out=tmp_path / "at once"))
    copy = shutil.copy

    def full(*arguments):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(across.shutil, "copy", full)
        experiment.run(recipe, out=tmp_path / "run", reuse=[source])
    assert across.shutil.copy is copy and report.results(tmp_path / "run") == []
    run, labels = trained(monkeypatch, recipe, out=tmp_path / "run", reuse=[source])
    assert content(run) == wanted and labels == []


def test_a_run_goes_on_from_several(source, tmp_path, monkeypatch):
    longer = experiment.run(short(arms=("random",), rounds=3), out=tmp_path / "longer")
    recipe = short(arms=("random", "ticket"), rounds=3)
    run, labels = trained(monkeypatch, recipe, out=tmp_path / "run", reuse=[longer, source])
    assert {label.split("/")[0] for label in labels} == {"ticket"}
    assert differing(content(run), content(experiment.run(recipe, out=tmp_path / "at once"))) == []


def test_which_run_a_variant_goes_on_from(source, tmp_path):
    assert across.sources(source, "first", True) == [source] and across.sources(source, "first", False) == []
    with runs.opened(recipes.Experiment("demo", "", "", (), {}), "demo", tmp_path, variants=["first"]):
        assert across.sources(tmp_path, "first", True) == []
        with runs.opened(short().resolve(1257), "first", tmp_path / "first"):
            assert across.sources(tmp_path, "first", False) == [tmp_path / "first"]
    with pytest.raises(ValueError, match="is not a run folder"):
        across.sources(tmp_path / "nothing", "first", True)


def test_rounds_of_ones_own_are_not_overwritten(source, tmp_path, monkeypatch):
    run = experiment.run(short(rounds=2), out=tmp_path / "run")
    (run / "ticket/trial_0/round_01/result.json").unlink()
    _, labels = trained(monkeypatch, short(rounds=2), out=run, reuse=[source])
    assert labels == ["ticket/trial_0/round_01", "ticket/trial_0/round_02"]


@pytest.mark.parametrize(
    "changes, named",
    [({"seed": 1}, "seed"), ({"lr": 0.5, "batch_size": 30}, "lr, batch_size"), ({"dropout": 0.1}, "dropout")],
    ids=str,
)
def test_other_settings_are_not_gone_on_from(source, tmp_path, changes, named):
    model = {"model": "conv-2"} if "dropout" in changes else {}
    message = refusal(experiment.run, short(**changes | model), out=tmp_path / "run", reuse=[source])
    assert "was made with another" in message and named.split(", ")[0] in message and str(source) in message
    assert not list(tmp_path.rglob("result.json"))


def test_where_rates_follow_from_the_rounds_these_must_be_the_same(tmp_path):
    source = experiment.run(short(final_density=0.5), out=tmp_path / "source")
    message = refusal(experiment.run, short(final_density=0.5, rounds=2), out=tmp_path / "run", reuse=[source])
    assert message.endswith("with another rounds")
    run = experiment.run(short(final_density=0.5, arms=("ticket", "keep")), out=tmp_path / "other", reuse=[source])
    assert report.summarize(run)["status"]["done"] == 4


def lenet():
    return lth.sparsify_(models.build("lenet-300-100", (1, 8, 8)))


def masks_of(run, round, arm="ticket"):
    return get_masks(lth.load_(lenet(), run / f"{arm}/trial_0/round_{round:02d}/ticket.safetensors"))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def chains(recipe):
    loaded = experiment.data.load("digits")
    return experiment.chains(recipe.resolve(len(loaded.train.labels)), loaded)


@pytest.mark.parametrize("rewind", ["0", "3"])
def test_tickets_of_another_run(source, tmp_path, rewind):
    theirs = source if rewind == "3" else experiment.run(short(rewind="0", rounds=2), out=tmp_path / "theirs")
    recipe = short(arms=("ticket", "reinit"), rounds=2, rewind="0", lr=0.1, tickets_of=str(theirs))
    ticket, reinit = given = chains(recipe)
    across.take_tickets(given, theirs, recipe)
    begin = lth.snapshot(lottery.Chain(lenet(), 0).draw_())
    start = checkpoint.read_tensors(source / "ticket/trial_0/rewind.safetensors")[0] if rewind == "3" else begin
    for round in range(3):
        wanted = masks_of(theirs, round)
        assert ticket.is_ready(round) and equal(ticket.masks[round], wanted)
        model = ticket.prepare(round).model
        assert equal(
            lth.snapshot(model), lottery.merged(wanted, start if round else begin, dict.fromkeys(begin, torch.zeros(1)))
        )
        ticket.finished[round] = {}
    assert reinit.is_ready(2) and equal(reinit.masks[2], masks_of(theirs, 2))
    run = experiment.run(recipe, out=tmp_path / "run")
    assert all(equal(masks_of(run, round, arm), masks_of(theirs, round)) for round in range(3) for arm in recipe.arms)
    assert report.summarize(run)["status"]["done"] == 6


def test_tickets_of_another_run_are_rewound_to_its_values(source, tmp_path, monkeypatch):
    train, began = training.train, {}

    def watched(tickets, *more):
        began.update({ticket.label: (ticket.start, lth.snapshot(ticket.model)) for ticket in tickets})
        return train(tickets, *more)

    monkeypatch.setattr(training, "train", watched)
    run = experiment.run(short(rounds=2, lr=0.1, tickets_of=str(source)), out=tmp_path / "run")
    theirs = checkpoint.read_tensors(source / "ticket/trial_0/rewind.safetensors")[0]
    zeros = dict.fromkeys(theirs, torch.zeros(1))
    for round in (1, 2):
        at, values = began[f"ticket/trial_0/round_0{round}"]
        assert at == 3 and equal(values, lottery.merged(masks_of(source, round), theirs, zeros))
    assert not list(run.rglob("rewind.safetensors"))


@pytest.mark.parametrize("option", ["tickets_of", "without"])
def test_runs_that_nothing_can_be_taken_from(source, tmp_path, option):
    def refused(**given):
        return refusal(experiment.run, short(**{option: str(source)} | given), out=tmp_path / "run")

    assert "must have model 'conv-2', got 'lenet-300-100'" in refused(model="conv-2")
    assert "must have seed 1, got 0" in refused(seed=1)
    assert "'nowhere' is no run folder" in refused(**{option: "nowhere"})
    trials = refused(trials=2)
    if option == "without":
        assert trials == f"{source} has no ticket of trial 1"
    else:
        assert f"{source}/ticket/trial_1 has no round_00" in trials
        assert f"rounds must be at most 2, as {source}/ticket/trial_0 has no round_03" in refused(rounds=3)
    assert not list(tmp_path.iterdir()), "no folder is made"


@pytest.mark.parametrize("winner", [2, 1, 0])
def test_a_network_without_its_winning_ticket(source, tmp_path, winner):
    theirs = shutil.copytree(source, tmp_path / "theirs")
    for round in range(3):  # the sparsest of these that is as good as the dense network, or the sparsest of all
        path = theirs / f"ticket/trial_0/round_{round:02d}/result.json"
        result = runs.read_json(path)
        result["early_stop"]["validation_accuracy"] = 0.9 if round == winner else 0.9 - 0.1 * bool(round)
        runs.store(path, result)
    recipe = short(arms=("ticket", "one-shot"), without=str(theirs), rounds=1)
    begin, masks = lth.snapshot(lottery.Chain(lenet(), 0).draw_()), masks_of(source, winner or 2)
    run = experiment.run(recipe, out=tmp_path / "run")
    first, second = (
        checkpoint.read_tensors(run / arm / "trial_0/initial.safetensors")[0] for arm in ("ticket", "one-shot")
    )
    assert equal(first, second), "all arms start from the same"
    for layer, mask in masks.items():
        assert torch.equal(first[f"{layer}.weight"] == begin[f"{layer}.weight"], ~mask) and mask.any()
    dense = runs.read_json(run / "ticket/trial_0/round_00/result.json")
    assert dense["density"] == 1, "it is no smaller"
    again = short(without=str(run), rounds=0)
    (chain,) = given = chains(again)
    across.take_network_without(given, run, again)
    mask = masks_of(run, 1)["fc1"]
    assert torch.equal(chain.initial["fc1.weight"] == first["fc1.weight"], ~mask), "of the network that run began with"


def test_where_a_run_is_found(source, tmp_path):
    beside = shutil.copytree(source, tmp_path / "first")
    assert across.find("first", tmp_path / "second") == beside
    assert across.find(str(source), None) == across.find(str(source), tmp_path / "second") == source
    assert "no variant that ran before" in refusal(across.find, "third", tmp_path / "second")
