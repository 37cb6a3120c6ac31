"""The paper's networks: shapes and counts as printed, pruning ladders, Glorot normal start, refusals."""

import json
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from lth_sparse import models

CLAIMS = json.loads((Path(__file__).parents[1] / "experiments" / "paper_claims.json").read_text())
LADDERS = dict(zip(models.NAMES, CLAIMS["pm_ladders_percent_by_round"].values(), strict=True))  # same order
MNIST, CIFAR10 = (1, 28, 28), (3, 32, 32)
SHAPES = {name: MNIST if name == "lenet-300-100" else CIFAR10 for name in models.NAMES}
SMALLEST = {"lenet-300-100": 1, "conv-2": 2, "conv-4": 4, "conv-6": 8, "resnet-18": 1, "vgg-19": 16}
CONV_RATE = {"conv-6": 0.15, "resnet-18": 0.2, "vgg-19": 0.2}  # the paper's, where it is not 0.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(model):
    kinds = (nn.Conv2d, nn.Linear)
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, kinds)}


def test_names():
    assert models.NAMES == ("lenet-300-100", "conv-2", "conv-4", "conv-6", "resnet-18", "vgg-19")


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-2", "conv-4", "conv-6"])
def test_counts_are_the_papers(name):
    model, want = models.build(name, SHAPES[name]), CLAIMS["param_counts"][name]
    layers = {name: weight.numel() for name, weight in weights(model).items()}
    assert list(layers.values()) == want["layers"]
    assert sum(count for name, count in layers.items() if name.startswith("conv")) == want["conv"]
    assert sum(layers.values()) == want["w"]
    assert sum(p.numel() for p in model.parameters()) == want["w"] + want["bias"]
    assert list(layers)[-3:] == ["fc1", "fc2", "output"]


def ladder(model, rates, rounds, pooled, pruned=round):
    """Percent of the weights left after each round, pruned per layer or from one pool."""
    kept = {name: weight.numel() for name, weight in weights(model).items()}
    assert kept.keys() == rates.keys()
    total = sum(kept.values())
    if pooled:
        [rate] = {rate for rate in rates.values() if rate}
        pool = sum(count for name, count in kept.items() if rates[name])
        kept, rates = {"pool": pool, "whole": total - pool}, {"pool": rate, "whole": 0}
    percent = [100.0]
    for _ in range(rounds):
        kept = {name: count - pruned(rates[name] * count) for name, count in kept.items()}
        percent.append(100 * sum(kept.values()) / total)
    return percent


@pytest.mark.parametrize("name", models.NAMES)
def test_pruning_ladder_is_the_papers(name):
    model = models.build(name, SHAPES[name])
    rates = models.pruning_rates(model, fc=0.2, conv=CONV_RATE.get(name, 0.1))
    want, pooled = LADDERS[name], name in ("resnet-18", "vgg-19")
    # The reference ladder of resnet-18 lets fractions of a weight be pruned, the others count whole ones.
    got = ladder(model, rates, len(want) - 1, pooled, pruned=float if name == "resnet-18" else round)
    assert [round(percent, 3) for percent in got] == want
    assert ladder(model, rates, len(want) - 1, pooled) == pytest.approx(want, abs=0.001)


DEEP = [("resnet-18", 3200, 270_896), ("vgg-19", 5120, 20_024_000)]


@pytest.mark.parametrize("name, unpruned, total", DEEP)
def test_deep_networks_keep_output_and_shortcuts_whole(name, unpruned, total):
    model = models.build(name, CIFAR10)
    sizes = {name: weight.numel() for name, weight in weights(model).items()}
    rates = models.pruning_rates(model, conv=0.2)
    whole = [layer for layer, rate in rates.items() if rate == 0]
    assert sum(sizes[layer] for layer in whole) == unpruned
    assert sum(sizes.values()) == total
    assert "output" in whole and all(layer == "output" or "shortcut" in layer for layer in whole)
    assert {rate for layer, rate in rates.items() if layer not in whole} == {0.2}


def test_default_rates_halve_the_output():
    rates = models.pruning_rates(models.build("conv-2", CIFAR10))
    assert rates == {"conv1": 0.1, "conv2": 0.1, "fc1": 0.2, "fc2": 0.2, "output": 0.1}


def test_rates_of_any_model_halve_its_last_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert models.pruning_rates(model, fc=0.4) == {"0": 0.4, "2": 0.2}
    assert models.pruning_rates(nn.Sequential(nn.Conv2d(1, 1, 3))) == {"0": 0.1}


@pytest.mark.parametrize("rates", [{"fc": 1.0}, {"conv": -0.1}, {"fc": float("nan")}])
def test_rates_out_of_range_are_refused(rates):
    with pytest.raises(ValueError, match=rf"{next(iter(rates))} pruning rate must lie in \[0, 1\)"):
        models.pruning_rates(models.build("lenet-300-100"), **rates)


@pytest.mark.parametrize("name", models.NAMES)
def test_forward_on_the_smallest_and_the_usual_input(name):
    smallest = SMALLEST[name]
    for shape in [(2, smallest, smallest), (1, smallest + 1, smallest + 3), SHAPES[name]]:
        out = models.build(name, shape, classes=7)(torch.rand(2, *shape))
        assert out.shape == (2, 7) and out.isfinite().all()


@pytest.mark.parametrize("name", [name for name, smallest in SMALLEST.items() if smallest > 1])
def test_too_small_an_input_is_refused(name):
    smallest = SMALLEST[name]
    with pytest.raises(ValueError, match=f"{name} takes images of {smallest}x{smallest} or more"):
        models.build(name, (3, smallest, smallest - 1))


@pytest.mark.parametrize("shape", [(28, 28), (1, 28, 28.0), (1, 0, 28), (0, 28, 28), 784, (1, 1, 28, 28)])
def test_input_shape_that_is_not_three_positive_integers_is_refused(shape):
    with pytest.raises(ValueError, match="input_shape must be 3 positive integers"):
        models.build("lenet-300-100", shape)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lenet",), "unknown model 'lenet': choose from lenet-300-100, conv-2"),
        (("conv-2", CIFAR10, 10, "gelu"), "unknown activation 'gelu': choose from relu, sigmoid, tanh"),
        (("vgg-19", CIFAR10, 10, "tanh"), "vgg-19 takes the activation 'relu' only"),
        (("resnet-18", CIFAR10, 10, "sigmoid"), "resnet-18 takes the activation 'relu' only"),
        (("conv-2", CIFAR10, 0), "classes must be a positive integer, got 0"),
    ],
)
def test_what_no_network_takes_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(*arguments)


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_activation_follows_every_hidden_layer(activation):
    kinds = [type(layer).__name__.lower() for layer in models.build("conv-2", CIFAR10, activation=activation)]
    head = ["flatten", "linear", activation, "linear", activation, "linear"]
    assert kinds == ["conv2d", activation, "conv2d", activation, "maxpool2d", *head]


def test_layers_have_readable_names():
    lenet = dict(models.build("lenet-300-100").named_children())
    assert list(lenet) == ["flatten", "fc1", "relu1", "fc2", "relu2", "output"]
    vgg = dict(models.build("vgg-19", CIFAR10).named_children())
    assert list(vgg)[:4] == ["conv1", "bn1", "relu1", "conv2"]
    assert list(vgg)[-5:] == ["bn16", "relu16", "avgpool", "flatten", "output"]
    assert sum(name.startswith("pool") for name in vgg) == 4


def test_convolutions_before_batch_norm_have_no_bias():
    for name in ("resnet-18", "vgg-19"):
        convolutions = [m for m in models.build(name, CIFAR10).modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == {"resnet-18": 21, "vgg-19": 16}[name]
        assert all(layer.bias is None for layer in convolutions)


def test_resnet_halves_the_image_twice():
    model = models.build("resnet-18", CIFAR10)
    x = torch.rand(2, *CIFAR10)
    shapes = [tuple((x := layer(x)).shape[1:]) for layer in list(model)[:12]]
    assert shapes[3:] == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_residual_block_adds_its_input():
    block = models.build("resnet-18", CIFAR10).block1.eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, 16, 4, 4)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("name", ["lenet-300-100", "conv-6", "resnet-18"])
def test_weights_start_glorot_normal_and_biases_zero(name):
    model = models.build(name, SHAPES[name], generator=seeded())
    for weight in weights(model).values():
        fan_out, fan_in = (size * weight[0, 0].numel() for size in weight.shape[:2])
        z = weight.detach().flatten() / (2 / (fan_in + fan_out)) ** 0.5
        error = z.numel() ** -0.5  # standard deviation of the mean; of z.var() it is sqrt(2) of that
        assert abs(z.mean()) < 5 * error
        assert abs(z.var() - 1) < 5 * 2**0.5 * error
        within = (z.abs() < 1).float().mean()  # 0.683 when normal, 0.577 when uniform
        assert abs(within - 0.6827) < 5 * 0.4654 * error
    assert all(not p.any() for key, p in model.named_parameters() if key.endswith("bias"))


@pytest.mark.parametrize("name", models.NAMES)
def test_a_seed_names_the_weights(name):
    first, again, other = (models.build(name, SHAPES[name], generator=seeded(seed)) for seed in (3, 3, 4))
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert all(not torch.equal(w, weights(other)[layer]) for layer, w in weights(first).items())


def test_build_leaves_the_global_generator_alone_unless_it_is_the_one():
    torch.manual_seed(5)
    models.build("lenet-300-100", generator=seeded())
    assert torch.get_rng_state().equal(torch.manual_seed(5).get_state())
    first = models.build("lenet-300-100")
    assert torch.equal(models.build("lenet-300-100", generator=seeded(5)).fc1.weight, first.fc1.weight)


@pytest.mark.parametrize("name", models.NAMES)
def test_reset_parameters_gives_what_build_gives(name):
    model = models.build(name, SHAPES[name], generator=seeded(1))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(3)
    model.reset_parameters(seeded(2))
    want = models.build(name, SHAPES[name], generator=seeded(2)).state_dict()
    assert all(torch.equal(value, want[key]) for key, value in model.state_dict().items())


class Swapped(nn.Linear):
    pass


def test_reset_parameters_reaches_swapped_classes_copies_and_slices_in_place():
    model = deepcopy(models.build("lenet-300-100", generator=seeded(1)))
    model.fc1.__class__ = Swapped
    weight, version = model.fc1.weight, model.fc1.weight._version
    model.reset_parameters(seeded(2))
    assert model.fc1.weight is weight and weight._version > version and weight.requires_grad
    assert torch.equal(weight, models.build("lenet-300-100", generator=seeded(2)).fc1.weight)
    assert list(dict(model[:2].named_children())) == ["flatten", "fc1"]


@pytest.mark.gpu
def test_a_seed_names_the_same_weights_on_the_gpu():
    model = models.build("resnet-18", CIFAR10).cuda()
    model.reset_parameters(seeded(2))
    want = models.build("resnet-18", CIFAR10, generator=seeded(2)).state_dict()
    assert all(torch.equal(value.cpu(), want[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", models.NAMES)
def test_gradient_reaches_every_parameter(name):
    model = models.build(name, SHAPES[name], generator=seeded())
    x, y = torch.rand(4, *SHAPES[name], generator=seeded(1)), torch.arange(4)
    nn.functional.cross_entropy(model(x), y).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), key


def test_dropout_is_before_every_linear_but_the_first_of_the_head():
    kinds = [type(layer).__name__.lower() for layer in models.build("conv-2", CIFAR10, dropout=0.5)]
    assert kinds[-8:] == ["flatten", "linear", "relu", "dropout", "linear", "relu", "dropout", "linear"]
    assert not any(isinstance(layer, models.Dropout) for layer in models.build("conv-2", CIFAR10))
    with_it, without = (models.build("conv-4", CIFAR10, dropout=rate, generator=seeded()) for rate in (0.3, 0.0))
    assert all(torch.equal(tensor, without.state_dict()[name]) for name, tensor in with_it.state_dict().items())


@pytest.mark.parametrize("name, rate", [("conv-2", 1.0), ("conv-2", -0.1), ("lenet-300-100", 0.5), ("vgg-19", 0.5)])
def test_dropout_that_no_network_takes_is_refused(name, rate):
    with pytest.raises(ValueError, match=f"dropout must be 0, or below 1 for conv-2, -4 and -6, got {rate} for {name}"):
        models.build(name, SHAPES[name], dropout=rate)


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_dropout_drops_at_its_rate_and_scales_what_stays(rate):
    layer, x = models.Dropout(rate).train(), torch.rand(200, 500, generator=seeded()) + 1
    layer.seed = 3
    out = layer(x)
    dropped = out == 0
    assert abs(dropped.float().mean() - rate) < 5 * (rate * (1 - rate) / x.numel()) ** 0.5
    torch.testing.assert_close(out[~dropped], x[~dropped] / (1 - rate))


def test_dropout_follows_from_its_seed_alone():
    layer, x = models.Dropout(0.5).train(), torch.ones(4, 50)
    torch.manual_seed(0)
    state, found = torch.get_rng_state(), []
    for seed in (3, 4, 2**63 - 1, 3):
        layer.seed = seed
        found.append(layer(x))
    assert torch.equal(found[0], found[3]) and len({str(out.tolist()) for out in found}) == 3
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    with ThreadPoolExecutor(1) as pool:
        layer.seed = 3
        assert torch.equal(pool.submit(layer, x).result(), found[0])


def test_dropout_drops_nothing_in_eval_mode_or_without_a_seed():
    layer, x = models.Dropout(0.9), torch.rand(4, 50)
    assert torch.equal(layer.train()(x), x)
    layer.seed = 3
    assert torch.equal(layer.eval()(x), x) and not torch.equal(layer.train()(x), x)
