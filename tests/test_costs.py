"""Bytes and flops of a step against what the tensors of a real layer hold, and the roofline."""

import pytest
import torch
from kernel_oracle import DEVICE
from torch import nn

import lth_sparse as lth
from lth_sparse import costs
from lth_sparse.costs import Cost, Machine, step_cost
from lth_sparse.dispatch import Layer
from lth_sparse.ops import STRATEGIES, conv_sizes

EVERY = [(kind, name) for kind, table in STRATEGIES.items() for name in table]


def layer(kind, density, device="cpu"):
    torch.manual_seed(0)
    module = nn.Linear(512, 768) if kind == "linear" else nn.Conv2d(64, 96, 3, padding=1)
    masked = lth.sparsify_(module.to(device))
    return lth.prune_(masked, 1 - density) if density < 1 else masked


def description(kind, masked):
    if kind == "linear":
        return Layer(kind, masked.weight_mask[None], (768,), torch.float32, (60, 512))
    masks = masked.weight_mask.permute(0, 2, 3, 1)[None]
    return Layer(kind, masks, conv_sizes(masked), torch.float32, (2, 64, 8, 8))


@pytest.mark.parametrize("kind, strategy", EVERY)
def test_resident_bytes_are_those_of_a_layer_in_training(kind, strategy, monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", strategy)
    masked = layer(kind, 0.1, DEVICE)
    predicted = step_cost(description(kind, masked), strategy).resident
    packed = lth.pack_(masked)
    optimizer = torch.optim.Adam([packed.values])
    packed.values.grad = torch.zeros_like(packed.values)
    optimizer.step()
    moments = [value for value in optimizer.state[packed.values].values() if value.numel() > 1]
    shadow = [] if packed.shadow is None else [packed.shadow]
    held = [packed.values, packed.values.grad, *moments, *packed.pattern, packed.bits, *shadow]
    kept_positions = 4 * packed.values.numel() * len(shadow)  # of the packed optimizers
    assert predicted == sum(tensor.nbytes for tensor in held) + kept_positions


@pytest.mark.parametrize("kind, strategy", EVERY)
def test_memory_is_below_dense_from_half_the_weights_on(kind, strategy):
    dense = 16 * layer(kind, 1).weight.numel()  # weight, gradient and two moments
    for density, most in ((0.5, 1.0), (0.2, 0.75), (0.05, 0.4)):
        assert step_cost(description(kind, layer(kind, density)), strategy).resident < most * dense


def test_a_masked_step_counts_every_weight():
    cost = step_cost(description("linear", layer("linear", 0.1)), "masked")
    weights, images = 512 * 768, 60 * (512 + 768)
    assert cost.flops == 6 * 60 * weights
    assert cost.bytes == 4 * (3 * images + 10 * weights) + weights and cost.resident == 17 * weights


@pytest.mark.parametrize("kind, strategy, share", [("linear", "csr", 3), ("conv2d", "csr", 2), ("conv2d", "dense", 0)])
def test_products_skip_what_the_strategy_skips(kind, strategy, share):
    described = description(kind, layer(kind, 0.1))
    dense, packed = (step_cost(described, name).flops for name in ("masked", strategy))
    assert packed == pytest.approx(dense * (1 - 0.9 * share / 3), rel=1e-3)


def test_fewer_weights_move_fewer_bytes():
    for kind, strategy in EVERY:
        few, many = (step_cost(description(kind, layer(kind, density)), strategy) for density in (0.05, 0.5))
        assert few.bytes < many.bytes and few.flops <= many.flops


def test_the_roofline_is_the_slower_of_memory_and_arithmetic():
    assert costs.least_seconds(Cost(10, 100, 0), Machine(bandwidth=50, rate=10)) == 2
    assert costs.least_seconds(Cost(100, 10, 0), Machine(bandwidth=50, rate=10)) == 10


def test_the_machine_has_limits():
    found = costs.machine(torch.device(DEVICE), torch.float32, torch.get_num_threads())
    assert 1e9 < found.bandwidth < 1e14 and 1e9 < found.rate < 1e16
