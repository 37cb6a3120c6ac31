"""Optimizers: pruned weights, their gradients and moments stay exactly zero under every one of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lth_sparse as lth
from lth_sparse.masks import masked_weights


class Shift(optim.Optimizer):
    """An optimizer torch does not know, which moves every entry behind autograd's back."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(1)


MOMENTUM = dict(lr=0.05, momentum=0.9, weight_decay=0.01)
RMSPROP = dict(lr=0.01, momentum=0.9, weight_decay=0.01)
OPTIMIZERS = [
    *[(optim.Adam, dict(lr=0.01, weight_decay=0.01) | how) for how in ({}, {"foreach": True}, {"fused": True})],
    *[(optim.AdamW, dict(lr=0.01, amsgrad=True) | how) for how in ({}, {"foreach": True}, {"fused": True})],
    *[(optim.SGD, MOMENTUM | how) for how in ({"nesterov": True}, {"foreach": True}, {"fused": True})],
    *[(optim.RMSprop, RMSPROP | how) for how in ({}, {"foreach": True}, {"centered": True})],
    *[(kind, {}) for kind in (optim.NAdam, optim.RAdam, optim.Adagrad, optim.Adadelta, optim.ASGD)],
]
EPSILON = [(optim.Adamax, {}), (optim.Rprop, {})]  # elementwise, but part of their state is never zero
MIXING = [
    (optim.LBFGS, {"max_iter": 3}),
    (optim.Muon, {}),
    (optim.Adafactor, {"lr": 0.1}),
    (Shift, {}),
]
every_optimizer = pytest.mark.parametrize(
    "kind, options", OPTIMIZERS, ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value)
)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    convolution = (nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*convolution, nn.Linear(48, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)


def batches(count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        images = torch.randn(10, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)
        yield images, torch.randint(4, (10,), generator=generator)


def train(model, optimizer, steps=3, after_step=lambda model, optimizer: None):
    for images, labels in batches(steps, next(model.parameters()).dtype):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        after_step(model, optimizer)
    return model


def assert_clean(model, optimizer):
    for weight in masked_weights(model):
        state = optimizer.state[weight.parameter].values()
        moments = [value for value in state if value.shape == weight.mask.shape]
        for tensor in [weight.parameter, weight.parameter.grad, *moments]:
            assert tensor[~weight.mask].numel() > 0 and (tensor[~weight.mask] == 0).all()
            assert tensor.isfinite().all()


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("carried", [False, True], ids=["new optimizer", "carried"])
@every_optimizer
def test_pruned_weights_stay_zero_after_every_step_of_every_round(kind, options, carried, scope):
    model = lth.sparsify_(network())
    optimizer = kind(model.parameters(), **options)
    train(model, optimizer)
    for round in range(1, 4):
        lth.prune_(model, 0.3, scope=scope, optimizer=optimizer if carried else None)
        if not carried:
            optimizer = kind(model.parameters(), **options)
        train(model, optimizer, after_step=assert_clean)
        assert lth.density(model) == pytest.approx(0.7**round, abs=0.01)


def dense_masked(kind, options, dtype, start, masks, steps):
    """The definition: an ordinary network run on weight * mask. Returns its parameters."""
    model = network(dtype)
    model.load_state_dict(start)
    parameters = dict(model.named_parameters())
    optimizer = kind(parameters.values(), **options)
    for images, labels in batches(steps, dtype):
        optimizer.zero_grad()
        masked = {name: p * masks[name] if name in masks else p for name, p in parameters.items()}
        F.cross_entropy(torch.func.functional_call(model, masked, images), labels).backward()
        optimizer.step()
    return parameters


@every_optimizer
def test_trajectory_is_that_of_a_dense_network_with_masks(kind, options):
    steps = 8
    model = lth.prune_(lth.sparsify_(network()), 0.6, scope="global")
    masks = {name.removesuffix("_mask"): mask for name, mask in model.named_buffers() if name.endswith("_mask")}
    start = copy.deepcopy(lth.snapshot(model))
    exact, torchs = (dense_masked(kind, options, d, start, masks, steps) for d in (torch.float64, torch.float32))
    ours = dict(train(model, kind(model.parameters(), **options), steps).named_parameters())
    error, torch_error = (max((p[n] - exact[n]).abs().max().item() for n in exact) for p in (ours, torchs))
    assert 0 < torch_error < 1e-2 and error <= 2 * torch_error


@pytest.mark.parametrize("kind, options", EPSILON)
def test_state_that_is_never_zero_moves_no_pruned_weight(kind, options):
    model = lth.sparsify_(network())
    optimizer = kind(model.parameters(), **options)
    for _ in range(3):
        lth.prune_(train(model, optimizer), 0.3, optimizer=optimizer)
        train(model, optimizer)
        assert all((weight.parameter[~weight.mask] == 0).all() for weight in masked_weights(model))


def test_no_kept_weight_is_frozen_whatever_its_sign_and_nothing_else_is_pruned():
    model = lth.sparsify_(network())
    others = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 1}
    before = lth.snapshot(lth.prune_(model, 0.5))
    assert all(torch.equal(before[name], value) for name, value in others.items()) and len(others) == 6
    train(model, optim.SGD(model.parameters(), lr=0.1))
    for weight in masked_weights(model):
        old, new = before[weight.name + ".weight"], weight.parameter.detach()
        for sign in (-1, 1):
            kept = (old.sign() == sign) & weight.mask
            assert kept.any() and (old[kept] != new[kept]).all()
    assert all((before[name] != p).any() for name, p in model.named_parameters() if name in others)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@every_optimizer
def test_nan_and_infinite_gradients_stop_at_the_mask(kind, options, poison):
    model = lth.prune_(lth.sparsify_(nn.Linear(6, 5)), 0.5)
    optimizer = kind(model.parameters(), **options)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.full((2, 6), poison)).sum().backward()
        optimizer.step()
        assert not model.weight[model.weight_mask].isfinite().any()
        assert (model.weight[~model.weight_mask] == 0).all() and (model.weight.grad[~model.weight_mask] == 0).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind, options", MIXING, ids=lambda value: getattr(value, "__name__", ""))
def test_optimizers_that_move_every_entry_are_cleaned_after(kind, options, compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    lth.prune_(lth.sparsify_(model), 0.5)
    before = lth.snapshot(model)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    optimizer = kind(model.parameters(), **options)

    def closure():
        optimizer.zero_grad()
        loss = (run(torch.ones(2, 6)) - 1).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        closure()
        optimizer.step(*[closure] * (kind is optim.LBFGS))
        for weight in masked_weights(model):
            assert (weight.parameter[~weight.mask] == 0).all()
            assert (weight.parameter != before[weight.name + ".weight"]).any()


class ReadsWeight(nn.Module):
    """Uses the weight of its layer past the layer's forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return F.linear(x, self.layer.weight)


@pytest.mark.parametrize("noise", [1.0, float("nan")])
def test_noise_on_the_gradients_of_pruned_weights_is_masked_before_the_step(noise):
    model = lth.sparsify_(nn.Sequential(nn.Linear(6, 5, bias=False)))
    for _ in range(2):
        lth.prune_(model, 0.5)
        optimizer = optim.Adam(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).sum().backward()
            for parameter in model.parameters():
                parameter.grad += noise
                assert parameter.grad.any(1).all()
            optimizer.step()
            if noise == noise:
                assert_clean(model, optimizer)
            else:
                assert all((weight.parameter[~weight.mask] == 0).all() for weight in masked_weights(model))
                nn.init.ones_(next(model.parameters()))


WAYS = {
    "called": lambda model, x: model(x),
    "checkpointed": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "called with its parameters": lambda model, x: functional_call(model, dict(model.named_parameters()), x),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_reach_pruned_weights_past_the_layer_are_masked_as_they_arrive(way):
    model, x = lth.sparsify_(ReadsWeight()), torch.ones(2, 6)
    for assigned in (False, True):
        lth.prune_(model, 0.3)
        if assigned:
            model.layer.weight = nn.Parameter(torch.ones(5, 6))
        weight, mask = model.layer.weight, model.layer.weight_mask
        optimizer = optim.Adam([weight])
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=assigned):
                WAYS[way](model, x).float().square().sum().backward()  # on top of the gradient there is
            assert not weight.grad[~mask].any() and weight.grad[mask].any()
            optimizer.step()
            assert not weight[~mask].any()


def test_a_layer_that_masks_its_gradient_keeps_no_hook():
    model = lth.prune_(lth.sparsify_(network()), 0.5)
    for _ in range(2):
        weights = [weight.parameter for weight in masked_weights(model)]
        assert all(weight._backward_hooks for weight in weights)
        train(model, optim.Adam(model.parameters()), 1)
        assert not any(weight._backward_hooks for weight in weights)
        lth.prune_(model, 0.5)


@pytest.mark.parametrize("kind", [optim.Adam, optim.SGD, optim.RMSprop])
def test_state_from_before_a_pruning_is_refused_in_one_sentence(kind):
    model = lth.sparsify_(network())
    optimizer = kind(model.parameters(), **({} if kind is optim.Adam else RMSPROP))
    train(lth.prune_(train(model, optimizer), 0.01, optimizer=optimizer), optimizer)  # carried: goes on
    lth.prune_(model, 0.2)
    before = lth.snapshot(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{kind.__name__} holds state.*\(3, 1, 3, 3\).*optimizer=optimizer\)$"):
            optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in lth.snapshot(model).items())
    train(model, kind(model.parameters()))


@pytest.mark.parametrize("how", ["state dict", "ticket", "mask written"])
def test_masks_that_come_by_another_way_make_state_stale_too(how, tmp_path):
    model, other = lth.sparsify_(network()), lth.prune_(lth.sparsify_(network()), 0.5)
    optimizer = optim.Adam(model.parameters())
    train(model, optimizer)
    if how == "state dict":
        model.load_state_dict(other.state_dict())
    elif how == "ticket":
        lth.save(other, tmp_path / "t")
        lth.load_(model, tmp_path / "t")
    else:
        model[4].weight_mask[:4] = False
        lth.sync_(model)
    assert all((weight.parameter.grad[~weight.mask] == 0).all() for weight in masked_weights(model))
    with pytest.raises(ValueError, match="^Adam holds state from before prune_"):
        optimizer.step()
    fresh = optim.Adam(model.parameters())
    train(model, fresh)
    assert all((weight.parameter[~weight.mask] == 0).all() for weight in masked_weights(model))
    fresh.load_state_dict(copy.deepcopy(fresh.state_dict()))
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    train(model, fresh)  # resumed with the state that belongs to these masks


@pytest.mark.parametrize("kind", [optim.Adam, optim.Muon])
def test_a_layer_made_dense_again_is_free(kind):
    model = lth.densify_(lth.prune_(lth.sparsify_(nn.Linear(6, 5, bias=False)), 0.5))
    optimizer = kind(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    nn.init.ones_(model.weight)
    optimizer.step()
    assert (model.weight != 0).all()


@every_optimizer
def test_an_optimizer_older_than_sparsify_keeps_working(kind, options):
    model = network()
    optimizer = kind(model.parameters(), **options)
    train(model, optimizer)
    train(lth.sparsify_(model), optimizer)
    lth.prune_(model, 0.5, optimizer=optimizer)
    train(model, optimizer, after_step=assert_clean)


def test_state_that_was_never_stepped_is_not_stale():
    model = lth.prune_(lth.sparsify_(network()), 0.5)
    optimizer = optim.Adagrad(model.parameters(), initial_accumulator_value=0.1)
    train(model, optimizer)
    assert all((weight.parameter[~weight.mask] == 0).all() for weight in masked_weights(model))


def test_kept_weights_that_are_zero_may_have_moments():
    model = lth.sparsify_(network())
    nn.init.zeros_(model[4].weight)
    snap, optimizer = lth.snapshot(model), optim.Adam(model.parameters())
    lth.prune_(train(model, optimizer), 0.5, optimizer=optimizer)
    train(lth.rewind_(model, snap), optimizer, after_step=assert_clean)


@pytest.mark.parametrize("kind", [optim.Adam, optim.Muon])
def test_writing_between_backward_and_step_does_not_revive(kind):
    model = lth.prune_(lth.sparsify_(nn.Linear(6, 5, bias=False)), 0.5)
    optimizer = kind(model.parameters())
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        with torch.no_grad():
            model.weight.add_(1)
        optimizer.step()
        assert (model.weight[~model.weight_mask] == 0).all() and (model.weight[model.weight_mask] != 0).all()
