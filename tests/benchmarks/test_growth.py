"""Growth and whole experiments: the records they make, from runs as short as can be."""

import pytest
import torch
from lth_sparse.benchmarks import experiments, growth
from lth_sparse.benchmarks.peers import plain
from lth_sparse.benchmarks.shapes import Level
from torch.utils.data import TensorDataset

from lth_sparse import data

CPU = torch.device("cpu")


def level(**given) -> Level:
    return Level(minutes=1, seconds=0.0, rounds=(7,), **given)


def test_a_step_is_timed_by_tickets_and_by_width(monkeypatch):
    monkeypatch.setattr(growth, "STEPS", 2)
    monkeypatch.setattr(growth, "ROUNDS", 6)
    found = list(growth.section(level(tickets=(1, 3), widths=(20, 30)), CPU))
    assert [record.shape for record in found[::2]] == ["1 tickets", "3 tickets", "width 20", "width 30"]
    assert {record.unit for record in found} == {"s", ""} and all(record.n == 6 for record in found)
    assert all(0 < record.low <= record.value <= record.high for record in found)
    assert found[1].value == 1.0 and found[1].metric == "times the step of 1 tickets"
    assert list(growth.section(level(), CPU)) == []


@pytest.fixture
def little(monkeypatch):
    """Digits, scaled to the size of MNIST's images, in its place."""
    loaded = data.load("digits")
    wide = [
        data.Split(torch.nn.functional.pad(split.images, (10, 10, 10, 10)), split.labels)
        for split in (loaded.train, loaded.validation, loaded.test)
    ]
    fitting = loaded._replace(train=wide[0], validation=wide[1], test=wide[2], input_shape=(1, 28, 28))
    splits = plain.Splits(*(TensorDataset(fitting.inputs(split.images), split.labels) for split in wide))
    monkeypatch.setattr(experiments.data, "load", lambda *arguments, **more: fitting)
    monkeypatch.setattr(plain, "mnist", lambda root: splits)


def test_peers_train_as_well_as_we(little):
    found = list(experiments.measured("", 1, 120, "cpu"))
    seconds = [record for record in found if record.metric == "seconds of a round"]
    assert [(record.provider, round(record.density, 3)) for record in seconds] == [
        (provider, density) for density in (1.0, 0.8) for provider in experiments.PROVIDERS
    ]
    accuracies = {(r.provider, r.metric, r.density): r.value for r in found if "accuracy" in r.metric}
    assert len(accuracies) == 18 and all(0.75 < value < 1 for value in accuracies.values())
    faster = [record for record in found if "times as fast" in record.metric]
    assert [record.metric.split(",")[0] for record in faster] == [
        "times as fast as plain",
        "times as fast as engine-dense",
    ]
    assert faster[0].value > 1 and "all together" in faster[0].note


def test_without_mnist_the_reason_is_recorded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plain, "mnist", lambda root: (_ for _ in ()).throw(RuntimeError("Dataset not found.")))
    (found,) = experiments.section(level(experiment=(1, 10)), CPU)
    assert found.status == "not runnable" and found.note == "Dataset not found."
    assert list(experiments.section(level(), CPU)) == []


def test_the_plain_peer_prunes_rewinds_and_reinitialises(monkeypatch):
    seen = []

    def trained(model, *arguments):
        linear = [layer for layer in model if hasattr(layer, "weight")]
        masks = [getattr(layer, "weight_mask", torch.ones_like(layer.weight)).clone() for layer in linear]
        values = [getattr(layer, "weight_orig", layer.weight).detach().clone() for layer in linear]
        seen.append((masks, values))
        with torch.no_grad():
            for layer in linear:
                getattr(layer, "weight_orig", layer.weight).mul_(2)
        return {}

    monkeypatch.setattr(plain, "train", trained)
    rounds = plain.rounds(
        plain.Splits(TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4)), None, None), 1, 1, 1, "cpu"
    )
    assert [next(rounds).keys() for _ in range(3)] == [dict.fromkeys(plain.ARMS).keys()] * 3
    tickets, reinits, randoms = seen[0::3], seen[1::3], seen[2::3]
    for round in range(3):
        kept = [int(mask.sum()) for mask in tickets[round][0]]
        assert kept == [int(mask.sum()) for mask in randoms[round][0]]
        assert all(map(torch.equal, tickets[round][0], reinits[round][0]))
        assert all(map(torch.equal, tickets[round][1], tickets[0][1])), "rewound"
        assert round == 0 or not torch.equal(reinits[round][1][0], reinits[round - 1][1][0])
        assert round == 0 or not torch.equal(randoms[round][0][0], tickets[round][0][0])
    assert kept[0] == pytest.approx(0.64 * 64 * 300, rel=1e-3) and kept[2] == 810
