"""Perceptrons trained together: against autograd in float64, against each alone, and whatever the strategy."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lth_sparse as lth
from lth_sparse import models
from lth_sparse.data import Data, Split
from lth_sparse.recipe import Recipe
from lth_sparse.training.stack import Stack, perceptron, strategies

LAYERS = ("fc1", "fc2", "output")


def images(classes=10) -> Data:
    """Random levels, as a data set keeps them."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (50, 1, 4, 5), dtype=torch.uint8, generator=generator)
    split = Split(levels, torch.randint(classes, (50,), generator=generator))
    return Data(
        "levels", split, split, split, (1, 4, 5), classes, "half", torch.tensor([2 / 255]), torch.tensor([-1.0])
    )


def tickets(count, density=0.5, activation="relu", seed=0):
    """Small networks with masks of their own, equally dense."""
    found, between = [], models.ACTIVATIONS[activation]
    for ticket in range(seed, seed + count):
        torch.manual_seed(ticket)
        layers = nn.Linear(20, 24), between(), nn.Linear(24, 13), between(), nn.Linear(13, 10)
        names = "fc1", "act1", "fc2", "act2", "output"
        network = lth.sparsify_(nn.Sequential(OrderedDict(zip(names, layers, strict=True))))
        generator = torch.Generator().manual_seed(ticket)
        found.append(lth.prune_(network, 1 - density, score="random", generator=generator) if density < 1 else network)
    return found


def settings(**given) -> Recipe:
    given = dict(batch_size=8, optimizer="sgd", lr=0.5, momentum=0.0, weight_decay=0.0) | given
    return Recipe(dataset="digits", device="cpu", threads=1, **given)


def batches(count, steps=1, size=8, seed=0):
    return torch.randint(50, (steps, count, size), generator=torch.Generator().manual_seed(seed))


def oracle_step(model, data, indices, rate=0.5) -> dict:
    """The model's values after a step of plain gradient descent on the kept weights, in float64."""
    dense = lth.densify_(copy.deepcopy(model)).double()
    x = data.train.images[indices].flatten(1).double() * 2 / 255 - 1
    F.cross_entropy(dense(x), data.train.labels[indices]).backward()
    moved = {name: p.detach() - rate * p.grad for name, p in dense.named_parameters()}
    return {
        n: t * perceptron(model)[n.split(".")[0]].weight_mask if n.endswith("weight") else t for n, t in moved.items()
    }


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("how", ["masked", "cpu", "dense", "bitmap", "csr"])
@pytest.mark.parametrize("count, density", [(1, 1.0), (1, 0.3), (3, 0.3), (3, 1.0)])
def test_a_step_is_that_of_autograd(count, density, how, activation):
    data, networks, indices = images(), tickets(count, density, activation), batches(count)
    stack = Stack(networks, data, settings(), dict.fromkeys(LAYERS, how))
    loss = stack.evaluate(data.train)[:, 0]
    stack.step(indices[0])
    for ticket, network in enumerate(networks):
        got, wanted = stack.dense(stack.tensors(), ticket), oracle_step(network, data, indices[0, ticket])
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name].double(), tensor, rtol=1e-5, atol=1e-6)
            assert not torch.equal(got[name], dict(network.named_parameters())[name]), "it moved"
    assert stack.loss.shape == (count,) and (stack.loss > 0.5 * loss).all() and (stack.loss < 2 * loss).all()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("how", ["masked", "cpu"])
def test_together_they_get_what_each_gets_alone(how, optimizer):
    data, recipe = images(), settings(optimizer=optimizer, lr=0.01, momentum=0.9, weight_decay=0.01)
    together, indices = Stack(tickets(4), data, recipe, dict.fromkeys(LAYERS, how)), batches(4, steps=30)
    for step in indices:
        together.step(step)
    for ticket in range(4):
        alone = Stack(tickets(1, seed=ticket), data, recipe, {})
        for step in indices[:, ticket]:
            alone.step(step[None])
        mine, theirs = together.dense(together.tensors(), ticket), alone.dense(alone.tensors(), 0)
        for name, tensor in theirs.items():  # 30 steps of rounding apart
            torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-4)
            off = ~perceptron(alone.models[0])[name.split(".")[0]].weight_mask if name.endswith("weight") else []
            assert not mine[name][off].any()
        torch.testing.assert_close(
            together.evaluate(data.test)[ticket], alone.evaluate(data.test)[0], rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(together.loss[ticket], alone.loss[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["masked", "cpu", "dense", "bitmap", "csr"])
def test_evaluation_counts_what_is_right(how):
    data, (network, other) = images(), tickets(2)
    stack = Stack([network, other], data, settings(), dict.fromkeys(LAYERS, how))
    for ticket, model in enumerate((network, other)):
        logits = model.double()(data.inputs(data.test.images).flatten(1).double()).detach()
        loss, accuracy = stack.evaluate(data.test)[ticket].tolist()
        assert loss == pytest.approx(float(F.cross_entropy(logits, data.test.labels)), rel=1e-5)
        assert accuracy == float((logits.argmax(1) == data.test.labels).double().mean())


@pytest.mark.parametrize("how", ["masked", "cpu"])
def test_values_come_back(how):
    data = images()
    stack = Stack(tickets(2), data, settings(), dict.fromkeys(LAYERS, how))
    start = {name: tensor.clone() for name, tensor in stack.tensors().items()}
    stack.step(batches(2)[0])
    assert all(not torch.equal(start[name], tensor) for name, tensor in stack.tensors().items())
    stack.load_(start)
    assert all(torch.equal(start[name], tensor) for name, tensor in stack.tensors().items())
    for ticket, network in enumerate(tickets(2)):
        found = stack.dense(start, ticket)
        assert all(torch.equal(found[name], tensor) for name, tensor in lth.snapshot(network).items())


def test_what_is_a_perceptron():
    assert list(perceptron(tickets(1)[0])) == list(LAYERS)
    masked = [lth.sparsify_(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))]
    assert perceptron(masked[0]) is not None
    others = [nn.Linear(3, 3, bias=False)], [nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2)], [nn.Linear(3, 3), nn.ReLU()]
    assert all(perceptron(lth.sparsify_(nn.Sequential(*layers))) is None for layers in others)
    assert perceptron(nn.Sequential(nn.Linear(3, 2))) is None and perceptron(masked[0][0]) is None
    assert perceptron(lth.sparsify_(models.build("conv-2"))) is None


def test_strategies_are_those_asked_for(monkeypatch):
    assert strategies(tickets(1), settings(strategy="cpu")) == dict.fromkeys(LAYERS, "cpu")
    assert strategies(tickets(2), settings(strategy="masked")) == dict.fromkeys(LAYERS, "masked")
    assert strategies(tickets(2), settings(strategy="bitmap"))["fc1"] in ("bitmap", "masked"), "where it can run"
    assert strategies(tickets(1), settings(strategy="shrink"))["fc1"] in ("shrink", "masked")
    assert strategies(tickets(2), settings(strategy="shrink")) == dict.fromkeys(LAYERS, "masked"), "one ticket alone"
    uneven = tickets(1, 0.5) + tickets(1, 0.4)
    assert strategies(uneven, settings(strategy="cpu")) == dict.fromkeys(LAYERS, "masked")
