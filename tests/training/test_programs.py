"""One program for each ticket: against the stack's own steps, and in the engine, stopped or not."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.data import Data, Split
from lth_sparse.ops import strategy
from lth_sparse.recipe import Recipe
from lth_sparse.training import Ticket, group, planning, programs, train
from lth_sparse.training.network import Network
from lth_sparse.training.programs import Programs
from lth_sparse.training.stack import Stack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = ("0", "2", "4")
RATES = [0.01, 0.02, 0.005]


class Stop(Exception):
    """Stands for a kill."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Have kernels run on the CPU too, which here is Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setattr(strategy, "DEVICE_TYPES", {DEVICE})
    monkeypatch.setattr(planning, "_key", lambda ticket, number, recipe: "all")  # together, as on CUDA


def levels(dtype=torch.uint8, channels=1, scale=1 / 128) -> Data:
    """Random images of whole levels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, channels, 2, 5), generator=generator).to(DEVICE, dtype)
    split = Split(images, torch.randint(5, (30,), generator=generator).to(DEVICE))
    scales = [torch.full((channels,), value, device=DEVICE) for value in (scale, -0.75)]
    return Data("levels", split, split, split, (channels, 2, 5), 5, "half", *scales)


def tickets(count=2, density=0.4, activation=nn.ReLU) -> list[Ticket]:
    """Small networks with masks of their own."""
    found = []
    for ticket in range(count):
        torch.manual_seed(ticket)
        layers = nn.Linear(10, 9), activation(), nn.Linear(9, 7), activation(), nn.Linear(7, 5)
        network = lth.sparsify_(nn.Sequential(nn.Flatten(), *layers).to(DEVICE))
        generator = torch.Generator().manual_seed(ticket)
        lth.prune_(network, 1 - density, score="random", generator=generator)
        found.append(Ticket(network, f"ticket/trial_{ticket}/round_01", ticket))
    return found


def settings(**given) -> Recipe:
    given = dict(iterations="4", evaluate_every="3", batch_size=6, lr=0.01, weight_decay=0.01) | given
    given = dict(optimizer="adam", strategy="trainer") | given
    return Recipe(dataset="digits", device=DEVICE, threads=1, **given).resolve(30)


def learner(kind, how, count=2):
    models = [nn.Sequential(*ticket.model[1:]) for ticket in tickets(count)]
    return kind(models, levels(), settings(), dict.fromkeys(LAYERS, how))


def batches(count=2):
    return torch.randint(30, (len(RATES), count, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)


def state(learner) -> dict:
    """All that training moves."""
    moments = {f"{i}.{name}": t for i, of in enumerate(learner.optimizer.state.values()) for name, t in of.items()}
    return learner.tensors() | moments | {"loss": learner.loss}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_steps_are_those_of_the_stack():
    ours, theirs = learner(Programs, "trainer"), learner(Stack, "csr")
    start = {name: tensor.clone() for name, tensor in ours.tensors().items()}
    ours.steps(batches(), RATES)
    for indices, rate in zip(batches(), RATES, strict=True):
        theirs.optimizer.param_groups[0]["lr"] = rate
        theirs.step(indices)
    assert state(ours).keys() == state(theirs).keys() and len(state(ours)) == 6 + 18 + 1
    for name, tensor in state(theirs).items():
        torch.testing.assert_close(state(ours)[name], tensor, rtol=1e-4, atol=1e-6)
    assert not any(torch.equal(start[name], tensor) for name, tensor in ours.tensors().items())
    evaluated = [learner.evaluate(levels().test) for learner in (ours, theirs)]
    torch.testing.assert_close(*evaluated, rtol=1e-5, atol=1e-6)


def test_however_many_steps_a_launch_takes_the_bits_are_the_same():
    whole, parts = (learner(Programs, "trainer", count=1) for _ in range(2))
    whole.steps(batches(1), RATES)
    parts.optimizer.param_groups[0]["lr"] = RATES[0]
    parts.step(batches(1)[0])
    parts.steps(batches(1)[1:2], RATES[1:2])
    assert not same(state(whole), state(parts))
    parts.optimizer.load_state_dict(parts.optimizer.state_dict())  # other tensors, of the same steps
    parts.steps(batches(1)[2:], RATES[2:])
    assert same(state(whole), state(parts))


def trained(given, recipe) -> list[dict]:
    """All that training gave."""
    results = train(given, levels(), recipe)
    return [
        {"history": result.history, "how": result.how, "final": lth.snapshot(ticket.model), "best": result.best}
        for ticket, result in zip(given, results, strict=True)
    ]


def test_the_engine_trains_by_programs_when_asked_to(monkeypatch):
    found = trained(tickets(), settings())
    monkeypatch.setattr(strategy, "DEVICE_TYPES", {"cuda"})
    wanted = trained(tickets(), settings(strategy="masked"))
    for ours, theirs in zip(found, wanted, strict=True):
        how = {"group": 2, "strategies": dict.fromkeys("135", "trainer"), "captured": "many steps are one launch"}
        assert ours["how"] == how and len(ours["history"]) == 2
        for row, other in zip(ours["history"], theirs["history"], strict=True):
            assert row == pytest.approx(other, rel=1e-3)
        for name, tensor in theirs["final"].items():
            torch.testing.assert_close(ours["final"][name], tensor, rtol=1e-3, atol=1e-5)


def test_resumed_to_the_same_bits(monkeypatch, tmp_path):
    wanted = trained(tickets(1), settings())
    advance = group.Group._advance

    def stopping(self):
        if self.iteration == 2:
            raise Stop
        advance(self)

    def saved():
        (ticket,) = tickets(1)
        ticket.folder = tmp_path
        return [ticket]

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(group, "SAVE_SECONDS", -1.0)
        patch.setattr(group, "STEPS", 1)
        patch.setattr(group.Group, "_advance", stopping)
        train(saved(), levels(), settings())
    monkeypatch.setattr(programs, "fits", None)  # not asked again
    for one, other in zip(trained(saved(), settings()), wanted, strict=True):
        assert one["history"] == other["history"] and one["how"] == other["how"]
        assert same(one["final"], other["final"]) and same(one["best"], other["best"])


@pytest.mark.parametrize(
    "given, data, recipe, message",
    [
        ({}, {}, dict(precision="bf16"), "precision 'fp32', got bf16"),
        ({}, {}, dict(optimizer="adamw"), "optimizer 'adam', got adamw"),
        ({}, {}, dict(augmentation="crop-flip"), "augmentation 'none', got crop-flip"),
        (dict(activation=nn.Tanh), {}, {}, "Linear layers with ReLU between them, got lenet-300-100 with relu"),
        (dict(activation=nn.GELU), {}, {}, "Linear layers with ReLU between them, got lenet-300-100 with relu"),
        ({}, dict(dtype=torch.float32), {}, r"images .* scaled bytes, got float32 \(1, 2, 5\) of levels"),
        ({}, dict(channels=3), {}, r"images .* scaled bytes, got uint8 \(3, 2, 5\) of levels"),
    ],
)
def test_what_no_program_trains_is_refused(given, data, recipe, message):
    with pytest.raises(ValueError, match=f"^strategy 'trainer' needs {message}$"):
        train(tickets(**given), levels(**data), settings(**recipe))


def test_large_batches_are_refused():
    from lth_sparse.kernels.ticket_trainer import BATCH

    recipe = Recipe(dataset="digits", device=DEVICE, batch_size=BATCH + 1, strategy="trainer")
    with pytest.raises(ValueError, match="^strategy 'trainer' needs batch_size up to 128, got 129$"):
        programs.check(tickets(1)[0].model, levels(), recipe)
    programs.check(tickets(1)[0].model, levels(), replace(recipe, batch_size=BATCH))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a CUDA device")
def test_there_must_be_a_gpu(monkeypatch):
    monkeypatch.setattr(strategy, "DEVICE_TYPES", {"cuda"})
    with pytest.raises(ValueError, match="^strategy 'trainer' needs a CUDA device, got cpu$"):
        train(tickets(), levels(), settings())


def test_tickets_that_are_dense_or_uneven_train_as_measured(monkeypatch):
    def kinds(given):
        ((_, kind, chosen),) = planning.plans(given, levels(), settings())
        return kind, set(chosen.values())

    monkeypatch.setattr(planning.stack, "strategies", lambda models, recipe: {"1": recipe.strategy})
    assert kinds(tickets()) == (Programs, {"trainer"})
    assert kinds(tickets(1, 0.5) + tickets(1, 0.4)) == (Stack, {"auto"})
    wide = lth.sparsify_(nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 5)).to(DEVICE))
    assert kinds([Ticket(wide, "wide", 0)]) == (Stack, {"auto"})
    lth.prune_(wide, 0.96)
    assert kinds([Ticket(wide, "wide", 0)]) == (Programs, {"trainer"})
    assert planning.plans([Ticket(wide, "wide", 0)], levels(), settings(strategy="auto"))[0].kind is Stack
    frozen = tickets(1)
    frozen[0].model[1].register_buffer("weight_frozen", torch.ones(9, 10, device=DEVICE))
    assert kinds(frozen) == (Network, {"masked"})
