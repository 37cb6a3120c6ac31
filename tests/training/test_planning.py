"""Which tickets train together, by what, and at which learning rates."""

import pytest
import torch

import lth_sparse as lth
from lth_sparse import models
from lth_sparse.data import Data, Split
from lth_sparse.recipe import Recipe
from lth_sparse.training import Ticket, group, planning, train
from lth_sparse.training.network import Network
from lth_sparse.training.optimizer import learning_rate
from lth_sparse.training.stack import Stack


def tiny() -> Data:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.rand(20, 1, 4, 4, generator=generator), torch.randint(10, (20,), generator=generator))
    return Data("tiny", split, split, split, (1, 4, 4), 10, "unit")


def settings(**given) -> Recipe:
    given = dict(iterations="6", evaluate_every="3", batch_size=8) | given
    return Recipe(dataset="digits", device="cpu", threads=1, **given).resolve(20)


def ticket(seed=0, **more) -> Ticket:
    network = models.build("lenet-300-100", (1, 4, 4), 10, generator=torch.Generator().manual_seed(seed))
    return Ticket(lth.prune_(lth.sparsify_(network), 0.9), f"ticket/trial_{seed}/round_01", seed, **more)


def freeze(ticket) -> Ticket:
    """What the masked layers of a ticket hold whose pruned weights stay at values of their own."""
    layer = ticket.model.fc1
    layer.register_buffer("weight_frozen", layer.weight_mask.logical_not().float())
    return ticket


@pytest.mark.parametrize("strategy", ["auto", "cpu", "masked"])
def test_with_frozen_weights_a_model_trains_as_a_masked_network(strategy):
    ((_, kind, chosen),) = planning.plans([freeze(ticket())], tiny(), settings(strategy=strategy))
    assert kind is Network and chosen == dict.fromkeys(("fc1", "fc2", "output"), "masked")
    nothing = ticket()
    nothing.model.fc1.register_buffer("weight_frozen", None)
    ((_, kind, chosen),) = planning.plans([nothing], tiny(), settings(strategy="cpu"))
    assert kind is Stack and chosen == dict.fromkeys(("fc1", "fc2", "output"), "cpu")


def test_on_cuda_together_are_those_of_one_start_and_one_schedule():
    class Cuda:
        device, precision, augmentation = "cuda", "fp32", "none"
        loss, optimizer, perturbation = "cross-entropy", "adam", 0.0

    def key(number, given):
        return planning._key(given, number, Cuda)

    assert key(0, ticket()) == key(1, ticket(1))
    others = [ticket(start=3), ticket(keep_at=3), ticket(fine_tune=True), freeze(ticket())]
    assert len({key(i, other) for i, other in enumerate([ticket(), *others])}) == 5


def test_fine_tuning_is_at_the_last_learning_rate():
    recipe = settings(optimizer="sgd", lr=0.5, warmup="4", milestones=("3", "5"))
    assert [learning_rate(recipe, i, fine_tune=True) for i in range(6)] == pytest.approx([0.005] * 6)
    assert learning_rate(recipe, 5) == pytest.approx(0.005) and learning_rate(recipe, 2) == pytest.approx(0.375)


@pytest.mark.parametrize("fine_tune", [False, True])
def test_a_group_trains_at_its_tickets_rates(monkeypatch, fine_tune):
    seen, take = [], group.Steps.take
    monkeypatch.setattr(group.Steps, "take", lambda self, i, m, rates: (seen.extend(rates), take(self, i, m, rates)))
    given, recipe = ticket(fine_tune=fine_tune), settings(milestones=("2", "4"), lr=0.1)
    train([given], tiny(), recipe)
    rates = [0.001] * 6 if fine_tune else [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert seen == pytest.approx(rates)
