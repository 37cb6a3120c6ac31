"""Rewinding and drawing anew: survivors' values, biases and buffers change, masks do not."""

import copy

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.masks import masked_weights


class Network(nn.Module):
    """Has a parameter and a buffer of its own, batch norm, tied weights and an attention."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.attention = nn.BatchNorm1d(width), nn.MultiheadAttention(width, 2)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x):
        self.seen += 1
        x = self.second(self.first(self.norm(x))) * self.scale
        return self.attention(x, x, x)[0]


def build(width=6, seed=0):
    torch.manual_seed(seed)
    return Network(width)


def pruned(model):
    return lth.prune_(lth.sparsify_(model), 0.5)


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    return model


def masks(model):
    return {weight.name: weight.mask.clone() for weight in masked_weights(model)}


def assert_holds(model, snap, kept):
    """`model` holds the values of `snap`, zero off the masks `kept`."""
    now = lth.snapshot(model)
    assert list(now) == list(snap)
    for name, value in snap.items():
        assert torch.equal(now[name], value * kept.get(name.removesuffix(".weight"), torch.ones((), dtype=torch.bool)))
    assert all(torch.equal(mask, kept[name]) for name, mask in masks(model).items())


@pytest.mark.parametrize("when", ["dense", "masked"])
def test_rewinding_restores_everything_but_pruned_weights(when):
    model = build() if when == "dense" else lth.sparsify_(build())
    snap = lth.snapshot(model)
    assert {"norm.running_mean", "norm.num_batches_tracked", "seen", "scale", "first.bias"} < set(snap)
    assert not any("mask" in name for name in snap)
    for _ in range(2):
        kept = masks(pruned(train(model)))
        assert model.norm.running_mean.any() and model.seen > 0 and (model.scale != 1).all()
        assert lth.rewind_(model, snap) is model
        assert_holds(model, snap, kept)


def test_a_snapshot_is_a_copy():
    model = pruned(build())
    snap = lth.snapshot(model)
    before = copy.deepcopy(snap)
    train(lth.rewind_(train(model), snap))
    assert all(torch.equal(snap[name], before[name]) for name in before)
    assert not any(value.requires_grad for value in snap.values())


def test_rewinding_leaves_gradients_flowing_to_the_same_parameters():
    model = pruned(build())
    snap, parameters = lth.snapshot(model), list(model.parameters())
    lth.rewind_(train(model), snap)
    assert all(p is q and p.requires_grad for p, q in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda snap: build(8) and lth.snapshot(build(8)),
            r"'scale' has shape \(8,\) there, shape \(6,\) in the model",
        ),
        (
            lambda snap: {k: v for k, v in snap.items() if k != "seen"},
            r"'seen' has no such entry there, shape \(\) in.*",
        ),
        (lambda snap: snap | {"extra": torch.ones(2)}, r"'extra' has shape \(2,\) there, no such entry in the model"),
        (lambda snap: {}, "'scale' has no such entry there, .*"),
    ],
)
def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(change, message):
    model = train(pruned(build()))
    before, kept = lth.snapshot(model), masks(model)
    with pytest.raises(ValueError, match=f"^the snapshot is of another model: {message}$"):
        lth.rewind_(model, change(before))
    assert_holds(model, before, kept)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_reinit_is_the_constructors_draw_on_the_same_masks():
    model = train(pruned(build()))
    kept = masks(model)
    assert lth.reinit_(model, seeded(7)) is model
    first = lth.snapshot(model)
    assert_holds(model, first, kept)
    assert not first["norm.running_mean"].any() and (first["norm.weight"] == 1).all()
    for weight in masked_weights(model):
        bound = weight.parameter.detach().abs().max()
        fresh = lth.snapshot(build(seed=1))
        name = weight.name if weight.name in fresh else weight.name + ".weight"
        assert 0.8 < bound / fresh[name].abs().max() < 1.25  # the range of its constructor's uniform law
        assert (weight.parameter[weight.mask] != 0).all()
    lth.reinit_(train(model), seeded(7))
    again = lth.snapshot(model)
    assert all(torch.equal(first[name], again[name]) for name in first if name not in ("scale", "seen"))
    lth.reinit_(model, seeded(8))
    assert not any(torch.equal(first[name], lth.snapshot(model)[name]) for name in ("first.weight", "first.bias"))
    assert train(model).first.weight[~model.first.weight_mask].count_nonzero() == 0


def test_reinit_draws_on_from_the_generator_and_leaves_the_global_state_alone():
    model, generator = pruned(build()), seeded(0)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = (lth.snapshot(lth.reinit_(model, generator))["first.weight"] for _ in range(2))
    assert not torch.equal(one, two) and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(lth.snapshot(lth.reinit_(model, seeded(0)))["first.weight"], one)


def test_a_network_with_an_initialisation_of_its_own_has_the_last_word():
    class Constant(nn.Sequential):
        def reset_parameters(self):
            for parameter in self.parameters():
                nn.init.constant_(parameter, 3)

    model = pruned(Constant(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))))
    lth.reinit_(model, seeded(0))
    for layer in (model[0], model[1][0]):
        assert torch.equal(layer.weight.detach(), 3.0 * layer.weight_mask) and (layer.bias == 3).all()
