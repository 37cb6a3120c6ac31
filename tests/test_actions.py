"""Rewinding and drawing anew: survivors' values, biases and buffers change, masks do not."""

import copy

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.actions import KEPT, PRUNED, weights_of
from lth_sparse.masks import freeze_, get_masks, masked_weights, set_masks_


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


START = torch.tensor([[4.0, -3, 0, 2], [-2, 1, -1, -5]])
FINAL = torch.tensor([[5.0, -1, 2, 2], [0.5, -4, 0, 6]])  # the last but one was pruned in an earlier round
MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
DEVIATION = 7.25**0.5  # of START


def just_pruned(frozen=None):
    """A layer trained from START to FINAL and pruned, with its snapshots."""
    layer = lth.sparsify_(nn.Linear(4, 2))
    start = {"weight": START, "bias": torch.tensor([1.0, 2])}
    set_masks_(layer, {"weight": FINAL != 0})
    freeze_(layer, frozen and {"weight": torch.full((2, 4), frozen)})
    final = {"weight": FINAL, "bias": torch.tensor([3.0, 4])}
    lth.rewind_(layer, final)
    set_masks_(layer, {"weight": MASK})
    return layer, start, final


def kept(name, seed=0):
    layer, start, _ = just_pruned()
    assert KEPT[name](layer, start, seeded(seed)) is None
    assert torch.equal(layer.weight_mask, MASK) and not layer.weight[~MASK].any()
    assert torch.equal(start["weight"], START) and torch.equal(START[0], torch.tensor([4.0, -3, 0, 2]))
    return layer.weight.detach(), layer.bias.tolist()


@pytest.mark.parametrize(
    "name, want, bias",
    [
        ("rewind", [4, -3, 0, 1], [1, 2]),
        ("rewind-zero-toward", [4, 0, 0, 1], [1, 2]),
        ("keep", [5, -1, 2, -4], [3, 4]),
        ("constant-sign", [DEVIATION, -DEVIATION, 0, DEVIATION], [1, 2]),
    ],
)
def test_kept_weights_that_nothing_draws(name, want, bias):
    weight, got_bias = kept(name)
    assert weight[MASK].tolist() == pytest.approx(want, rel=1e-6) and got_bias == bias


@pytest.mark.parametrize(
    "name, magnitudes, signed",
    [
        ("rewind-random-sign", {(4, 3, 0, 1)}, False),
        ("constant", {(DEVIATION,) * 4}, False),
        ("reshuffle", None, False),
        ("reshuffle-sign", None, True),
        ("reinit", None, False),
        ("reinit-sign", None, True),
    ],
)
def test_kept_weights_that_are_drawn(name, magnitudes, signed):
    draws = [kept(name, seed) for seed in range(12)]
    assert torch.equal(kept(name, 3)[0], draws[3][0])
    assert len({tuple(weight[MASK].tolist()) for weight, _ in draws}) > 3
    for weight, bias in draws:
        values = weight[MASK]
        assert (bias == [1, 2]) == ("reinit" not in name)
        if signed:
            assert values[2] == 0 and ((values.sign() == START[MASK].sign()) | (values == 0)).all()
        if magnitudes:
            assert tuple(values.abs().tolist()) == pytest.approx(*magnitudes, rel=1e-6)
        if name == "reshuffle":
            assert sorted(values.tolist()) == [-3, 0, 1, 4]
        if name == "reshuffle-sign":
            assert set(values.abs().tolist()) <= {0, 1, 3, 4} and values.count_nonzero() >= 2
        if "reinit" in name:
            assert (values.abs() < 0.5).all() and values.count_nonzero() == (3 if signed else 4)  # 1 / sqrt(4)


def test_signs_follow_the_reinitialisation_without_signs():
    assert torch.equal(kept("reinit-sign", 5)[0], kept("reinit", 5)[0].abs() * START.sign())


def test_the_deviation_of_a_single_weight_is_zero():
    layer = lth.sparsify_(nn.Linear(1, 1))
    KEPT["constant"](layer, lth.snapshot(layer), seeded(0))
    assert layer.weight.item() == 0


def gone(name, frozen=None, seed=0):
    layer, start, final = just_pruned(frozen)
    assert PRUNED[name](layer, start, final, seeded(seed)) is None
    assert torch.equal(layer.weight_mask, MASK) and torch.equal(layer.weight.detach(), FINAL * MASK)
    assert layer.bias.tolist() == [3, 4]
    values = masked_weights(layer)[0].frozen
    assert values is None or not values[MASK].any()
    return torch.zeros(2, 4) if values is None else values


@pytest.mark.parametrize(
    "name, frozen, want",
    [
        ("zero", None, [0, 0, 0, 0]),
        ("zero", -1.0, [0, 0, 0, 0]),
        ("freeze", None, [2, -2, -1, -5]),
        ("freeze", 9.0, [2, -2, -1, -5]),
        ("freeze-zero-toward", None, [2, 0, 0, -5]),  # 2 has not moved, the earlier one has lain at zero
        ("freeze-zero-toward", -1.0, [2, 0, -1, -5]),  # the earlier one was frozen where it started
    ],
)
def test_pruned_weights_that_nothing_draws(name, frozen, want):
    assert gone(name, frozen)[~MASK].tolist() == want


def test_pruned_weights_that_are_drawn():
    for name in ("freeze-reshuffle", "freeze-reinit"):
        draws = [gone(name, seed=seed)[~MASK] for seed in range(8)]
        assert torch.equal(gone(name, seed=3)[~MASK], draws[3]) and len({tuple(draw.tolist()) for draw in draws}) > 3
        for draw in draws:
            if name == "freeze-reshuffle":
                assert sorted(draw.tolist()) == [-5, -2, -1, 2]
            else:
                assert (draw.abs() < 0.5).all() and draw.all()


def test_redrawn_weights_train_again():
    layer, start, final = just_pruned(2.0)
    PRUNED["redraw"](layer, start, final, seeded(1))
    KEPT["keep"](layer, start, seeded(1))
    assert layer.weight_mask.all() and not hasattr(layer, "weight_frozen") and layer.bias.tolist() == [3, 4]
    assert torch.equal(layer.weight[MASK], FINAL[MASK])
    assert (layer.weight[~MASK].abs() < 0.5).all() and layer.weight[~MASK].all()


def whole(width=8, seed=0):
    torch.manual_seed(seed)
    return lth.sparsify_(nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Linear(width, 3)))


@pytest.mark.parametrize("name", [*KEPT, *PRUNED])
def test_every_action_follows_every_round(name):
    model, generator = whole(), seeded(0)
    start = lth.snapshot(model)
    with torch.no_grad():
        start["0.weight"][0] = 0  # a unit that starts dead
    for density in (0.5, 0.25):
        lth.rewind_(model, {key: value + 0.1 if value.is_floating_point() else value for key, value in start.items()})
        final = lth.snapshot(lth.sync_(model))
        lth.prune_(model, 0.5)
        PRUNED[name if name in PRUNED else "freeze"](model, start, final, generator)
        KEPT[name if name in KEPT else "keep"](model, start, generator)
        assert lth.density(model) == pytest.approx(1 if name == "redraw" else density, abs=0.02)
        assert any("frozen" in key for key in model.state_dict()) == (name not in ("zero", "redraw"))
        for weight in masked_weights(model):
            assert weight.parameter.isfinite().all() and not weight.parameter[~weight.mask].any()
        assert lth.snapshot(model).keys() == start.keys()


def test_actions_of_the_same_seed_agree_and_leave_the_global_state_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for name in KEPT:
        assert torch.equal(kept(name, 4)[0], kept(name, 4)[0])
    for name in ("freeze-reinit", "freeze-reshuffle"):
        assert torch.equal(gone(name, seed=4), gone(name, seed=4))
    torch.manual_seed(5)
    layer, start, final = just_pruned()
    state = torch.get_rng_state()
    PRUNED["freeze-reinit"](layer, start, final, seeded(0)), KEPT["reinit-sign"](layer, start, seeded(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_of_a_snapshot_have_the_names_of_the_masks():
    model = pruned(build())
    snap = lth.snapshot(model)
    found = weights_of(model, snap)
    assert list(found) == list(get_masks(model)) == ["attention.in_proj_weight", "attention.out_proj", "first"]
    assert torch.equal(found["first"], snap["first.weight"])
    for wrong in ({}, lth.snapshot(pruned(build(8)))):
        with pytest.raises(ValueError, match="^the snapshot is of another model: 'attention.in_proj_weight' has"):
            PRUNED["freeze"](model, wrong, snap, seeded(0))
    with pytest.raises(ValueError, match="weights of attention can only be pruned to zero$"):
        PRUNED["freeze"](model, snap, snap, seeded(0))


def test_packed_layers_are_refused():
    model = lth.prune_(whole(), 0.5)
    start = lth.snapshot(model)
    lth.pack_(model, strategies={"0": "cpu"})
    for name in PRUNED:
        with pytest.raises(ValueError, match="'0' is packed: call unpack_"):
            PRUNED[name](model, start, start, seeded(0))
    for name in KEPT.keys() - {"keep"}:
        with pytest.raises(ValueError, match="'0' is packed: call unpack_"):
            KEPT[name](model, start, seeded(0))


def test_frozen_values_are_no_part_of_snapshots_and_stay_in_rewinding():
    model = whole()
    start = lth.snapshot(model)
    lth.prune_(model, 0.5)
    freeze_(model, {name: torch.ones(mask.shape) for name, mask in get_masks(model).items()})
    assert lth.snapshot(model).keys() == start.keys()
    lth.rewind_(model, start)
    lth.reinit_(model, seeded(0))
    assert torch.equal(model[0].weight_frozen, 1.0 * ~model[0].weight_mask)
