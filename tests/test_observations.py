"""What a run looks at beside the training, on networks evaluated by hand."""

import pytest
import torch
import torch.nn.functional as F
from run_folders import content, tiny

import lth_sparse as lth
from lth_sparse import checkpoint, experiment, lottery, measures, models, observations, report, runs
from lth_sparse.data import load
from lth_sparse.masks import get_masks
from lth_sparse.training import Result, Ticket

SHORT = dict(iterations="4", evaluate_every="2", rounds=1)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)


def lenet():
    return lth.sparsify_(models.build("lenet-300-100", (1, 8, 8)))


def by_hand(model, split):
    """Loss and accuracy over a split of digits, image by image."""
    logits = torch.cat([model.eval()(image[None].float() / 16) for image in split.images]).detach()
    return float(F.cross_entropy(logits, split.labels)), float((logits.argmax(1) == split.labels).double().mean())


def test_evaluate_is_in_eval_mode_and_leaves_the_mode():
    data = load("digits")
    for training in (True, False):
        model = models.build("conv-2", (1, 8, 8), dropout=0.5).train(training)
        for layer in model:
            layer.seed = 1  # of the dropouts
        loss, accuracy = observations.evaluate(model, data, data.test)
        assert model.training == training
        assert (loss, accuracy) == pytest.approx(by_hand(model, data.test), rel=1e-5)


def test_untrained_accuracy_is_that_of_the_values_a_ticket_starts_from(tmp_path):
    run = experiment.run(tiny(arms=("ticket", "reinit", "keep"), untrained=1, **SHORT), out=tmp_path / "run")
    data, start = load("digits"), checkpoint.read_tensors(run / "ticket/trial_0/rewind.safetensors")[0]
    first = lth.rewind_(lenet(), lth.snapshot(lottery.Chain(lenet(), 0).draw_()))
    ticket = lth.load_(lenet(), run / "ticket/trial_0/round_01/ticket.safetensors")
    keep = lth.load_(lenet(), run / "keep/trial_0/round_01/ticket.safetensors")
    reinit = lottery.Chain(lenet(), 0, "reinit", masks={1: get_masks(ticket)})
    reinit.start = {}
    networks = {
        "ticket/trial_0/round_00": first,
        "keep/trial_0/round_00": first,
        "ticket/trial_0/round_01": lth.rewind_(ticket, start),
        "keep/trial_0/round_01": keep,
        "reinit/trial_0/round_01": reinit.prepare(1).model,
    }
    found = {}
    for label, model in networks.items():
        found[label] = runs.read_json(run / label / "result.json")["untrained_accuracy"]
        assert found[label] == pytest.approx(by_hand(model, data.test)[1]), label
    assert len(set(found.values())) > 2, "they could be mixed up"


def test_tickets_trained_together_keep_what_was_seen_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr("lth_sparse.training.planning._key", lambda ticket, number, recipe: "all")
    run = experiment.run(
        tiny(arms=("ticket", "reinit-chain"), rewind="0", untrained=1, **SHORT | {"rounds": 0}), out=tmp_path / "run"
    )
    results = {arm: runs.read_json(run / arm / "trial_0/round_00/result.json") for arm in ("ticket", "reinit-chain")}
    assert [result["group"] for result in results.values()] == [2, 2]
    model = lottery.Chain(lenet(), 0).draw_()
    assert results["ticket"]["untrained_accuracy"] == pytest.approx(by_hand(model, load("digits").test)[1])
    assert results["reinit-chain"]["untrained_accuracy"] != results["ticket"]["untrained_accuracy"]


def chain(arm="ticket", **given):
    model = lth.prune_(lenet(), 0.5)
    return lottery.Chain(model, 0, arm, masks={0: get_masks(model)}, **given)


def test_signs_and_dead_units_of_the_early_stop(tmp_path):
    given = chain(folder=tmp_path)
    with torch.no_grad():
        given.model.fc1.weight_mask[:3] = False
    given.masks[0] = get_masks(given.model)
    start = lth.snapshot(lth.sync_(given.model))
    given.start = start
    best = dict(start, **{"fc2.weight": start["fc2.weight"].clone()})
    best["fc2.weight"][:10] *= -1
    lth.rewind_(given.model, {name: tensor - 1 for name, tensor in start.items()})  # where training ended
    found = observations.of_round(given, 0, Result(best=best), None)
    assert found["dead_units"] == {"fc1": 3, "fc2": 0, "output": 0} and "barrier" not in found
    kept = given.masks[0]["fc2"]
    flipped = int((kept[:10] & (start["fc2.weight"][:10] != 0)).sum()) / int(kept.sum())
    assert found["sign_changes"] == {"fc1": 0.0, "fc2": flipped, "output": 0.0} and 0 < flipped < 1


def test_arms_drawn_anew_have_no_signs_to_keep(tmp_path):
    given = chain("reinit-chain", folder=tmp_path)
    assert set(observations.of_round(given, 0, Result(best=lth.snapshot(given.model)), None)) == {"dead_units", "zeros"}


@pytest.mark.parametrize("equal", [True, False])
def test_barrier_between_a_ticket_and_its_twin(tmp_path, equal):
    data, ticket = load("digits"), chain(folder=tmp_path)
    twin = chain("twin", folder=tmp_path, leaders=(ticket,))
    twin.masks = ticket.masks
    best = lth.snapshot(ticket.model)
    other = best if equal else {name: -tensor for name, tensor in best.items()}  # half way lies nothing
    folder = runs.round_folder(tmp_path, "ticket", 0, 0)
    result = Result(best=other)
    lth.set_masks_(twin.model, ticket.masks[0])
    assert "barrier" not in observations.of_round(twin, 0, result, data), "the ticket diverged at once"
    folder.mkdir(parents=True)
    checkpoint.save(ticket.become(0, best), folder / "trained.safetensors")
    barrier = observations.of_round(twin, 0, result, data)["barrier"]
    if equal:
        assert barrier == 0
    else:
        errors = [1 - by_hand(lth.rewind_(twin.model, snap), data.validation)[1] for snap in (best, other)]
        path = [{name: (1 - 0.1 * i) * best[name] + 0.1 * i * other[name] for name in best} for i in range(11)]
        highest = max(1 - by_hand(lth.rewind_(twin.model, snap), data.validation)[1] for snap in path)
        assert barrier == pytest.approx(highest - sum(errors) / 2, abs=1 / 180) and barrier > 0


def test_the_barrier_of_a_run_is_that_of_its_files(tmp_path):
    run = experiment.run(tiny(arms=("ticket", "twin"), **SHORT), out=tmp_path / "run")
    data = load("digits")
    for round in (0, 1):
        models_ = [
            lth.load_(lenet(), run / arm / f"trial_0/round_0{round}/trained.safetensors") for arm in ("ticket", "twin")
        ]
        ends = [lth.snapshot(model) for model in models_]
        path = measures.interpolate(models_[0], *ends, lambda model: by_hand(model, data.validation))
        found = runs.read_json(run / f"twin/trial_0/round_0{round}/result.json")["barrier"]
        assert found == pytest.approx(measures.instability(path), abs=1e-9)
        assert not torch.equal(ends[0]["fc1.weight"], ends[1]["fc1.weight"])
        assert "barrier" not in runs.read_json(run / f"ticket/trial_0/round_0{round}/result.json")


def test_learned_masks_are_recorded_once_for_each_trial(tmp_path, monkeypatch):
    recipe, rows = tiny(arms=("ticket",), trials=2, learn_masks=2, **SHORT | {"rounds": 0}), []
    run = experiment.run(recipe, out=tmp_path / "run", on_metrics=lambda label, row: rows.append((label, row)))
    names = [(name, trial) for trial in (0, 1) for name in ("learned", "learned-rescaled")]
    learned = [row for label, row in rows if label.startswith("learned")]
    assert learned and all(row["of"] == 2 for row in learned)
    for name, trial in names:
        folder = runs.round_folder(run, name, trial, 0)
        found, history = runs.read_json(folder / "mask.json"), runs.read_rows(folder / "metrics.jsonl")
        assert (found["mask"], found["trial"], found["of"]) == (name, trial, 2)
        best = min(history, key=lambda row: row["validation_loss"])
        assert {key: found[key] for key in best} == best
    accuracies = [runs.read_json(path)["test_accuracy"] for path in sorted(run.rglob("learned/*/*/mask.json"))]
    assert runs.read_json(run / "summary.json")["supermasks"]["learned"]["mean"] == pytest.approx(sum(accuracies) / 2)
    before, learn = content(run), observations.supermask.learn
    monkeypatch.setattr(observations.supermask, "learn", None)
    assert content(experiment.run(recipe, out=run)) == before, "nothing is learned again"
    monkeypatch.setattr(observations.supermask, "learn", learn)
    (run / "learned/trial_1/round_00/mask.json").unlink()
    assert content(experiment.run(recipe, out=run)) == before


def test_untrained_tickets_by_label():
    data, model = load("digits"), lenet()
    found = observations.untrained([Ticket(model, "a", 0), Ticket(lenet(), "b", 0)], data)
    assert list(found) == ["a", "b"] and found["a"] == pytest.approx(by_hand(model, data.test)[1])


def test_zeros_are_counted_as_the_layers_compute(tmp_path):
    model = lenet()
    given = lottery.Chain(model, 0, folder=tmp_path, masks={0: get_masks(model)}, start={})
    best = lth.snapshot(model)
    best["fc2.weight"][0, :7] = 0  # kept, and zero all the same
    best["fc1.bias"][:] = 0
    whole = sum(mask.numel() for mask in given.masks[0].values())
    assert observations.of_round(given, 0, Result(best=best), None)["zeros"] == 7 / whole
    given.masks[0]["fc1"][:5] = False  # 64 inputs each
    assert observations.of_round(given, 0, Result(best=best), None)["zeros"] == (7 + 5 * 64) / whole
    frozen = torch.zeros_like(best["fc1.weight"])
    frozen[:2] = 0.5
    given.carried[0] = best, {"fc1": frozen}
    assert observations.of_round(given, 0, Result(best=best), None)["zeros"] == (7 + 3 * 64) / whole


def test_zeros_of_a_run(tmp_path):
    run = experiment.run(tiny(arms=("ticket", "freeze"), **SHORT), out=tmp_path / "run")
    results = {(r["arm"], r["round"]): r for r in report.results(run)}
    assert results["ticket", 0]["zeros"] == 0 and results["freeze", 1]["density"] < 1
    assert results["ticket", 1]["zeros"] == pytest.approx(1 - results["ticket", 1]["density"]) != 0
    assert results["freeze", 1]["zeros"] == 0, "its pruned weights are frozen at values of their own"
