"""Noise on the smallest weights: on which, how much, when, and the same for the same seed."""

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse import models
from lth_sparse.data import Data, Split
from lth_sparse.masks import get_masks, masked_weights
from lth_sparse.recipe import Recipe
from lth_sparse.training import Ticket, network, planning, train
from lth_sparse.training.perturbation import perturb_


def half_pruned():
    torch.manual_seed(0)
    return lth.prune_(lth.sparsify_(nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 10))), 0.5)


def test_noise_is_on_the_smallest_kept_weights():
    model = half_pruned()
    before, masks = lth.snapshot(model), get_masks(model)
    assert perturb_(model, 0.2, 1.0, 3) is model
    after = lth.snapshot(model)
    for weight in masked_weights(model):
        old, new, kept = before[f"{weight.name}.weight"], after[f"{weight.name}.weight"], masks[weight.name]
        changed = old != new
        assert int(changed.sum()) == 0.2 * int(kept.sum()) and not (changed & ~kept).any()
        assert old[changed].abs().max() <= old[kept & ~changed].abs().min()
        noise, deviation = (new - old)[changed], old[kept].std(correction=0)
        assert abs(noise.std() / deviation - 1) < 5 / (2 * len(noise)) ** 0.5
        assert abs(noise.mean() / deviation) < 5 / len(noise) ** 0.5
    assert torch.equal(before["0.bias"], after["0.bias"]) and lth.density(model) == 0.5


def test_a_seed_stands_for_the_noise_and_the_scale_multiplies_it():
    one, again, other, twice = (half_pruned() for _ in range(4))
    begin = lth.snapshot(one)["0.weight"]
    for model, scale, seed in [(one, 1.0, 3), (again, 1.0, 3), (other, 1.0, 4), (twice, 2.0, 3)]:
        perturb_(model, 0.2, scale, seed)
    found = [lth.snapshot(model)["0.weight"] - begin for model in (one, again, other, twice)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.testing.assert_close(found[3], 2 * found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate, scale", [(0.0, 1.0), (0.2, 0.0)])
def test_nothing_changes_without_a_rate_or_a_scale(rate, scale):
    model, before = half_pruned(), lth.snapshot(half_pruned())
    perturb_(model, rate, scale, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in lth.snapshot(model).items())


def test_a_single_weight_has_no_deviation():
    model = lth.sparsify_(nn.Sequential(nn.Linear(1, 1)))
    value = model[0].weight.item()
    perturb_(model, 0.9, 5.0, 0)
    assert model[0].weight.item() == value


@pytest.mark.parametrize("start, noisy", [(0, [4, 7, 10]), (4, [4, 7, 10]), (5, [7, 10])])
def test_noise_comes_before_the_first_step_of_each_epoch_but_the_first(monkeypatch, start, noisy):
    seen, generator = [], torch.Generator().manual_seed(0)
    split = Split(torch.rand(20, 1, 4, 4, generator=generator), torch.randint(10, (20,), generator=generator))
    data = Data("tiny", split, split, split, (1, 4, 4), 10, "unit")
    asked = dict(dataset="digits", iterations="11", batch_size=6, perturbation=0.5, device="cpu", threads=1)
    recipe = Recipe(**asked, evaluate_every="11").resolve(20)

    def perturbed(model, rate, scale, seed):
        seen.append((seed, rate, scale))

    monkeypatch.setattr(network, "perturb_", perturbed)
    given = lth.sparsify_(models.build("lenet-300-100", (1, 4, 4)))
    train([Ticket(given, "ticket/trial_0/round_01", 100, start=start)], data, recipe)
    # epochs of 20 images begin within the steps 3, 6 and 9, so that 4, 7 and 10 are the first that see them alone
    assert seen == [(100 + iteration, 0.2, 0.5) for iteration in noisy]


def test_layers_are_not_packed_where_noise_is_to_reach_their_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(planning, "choose_strategies", lambda model, sample, forced: asked.append(forced) or {})
    split = Split(torch.rand(20, 1, 4, 4), torch.arange(20) % 10)
    data = Data("tiny", split, split, split, (1, 4, 4), 10, "unit")
    given = Ticket(lth.sparsify_(models.build("lenet-300-100", (1, 4, 4))), "ticket/trial_0/round_01", 0)
    for options in ({"perturbation": 0.5}, {"optimizer": "radam"}):
        recipe = Recipe(dataset="digits", iterations="4", batch_size=8, device="cpu", evaluate_every="4", **options)
        planning.plans([given], data, recipe.resolve(20))
    assert asked == ["masked", "auto"]
