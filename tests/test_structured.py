"""Structured tickets: exact counts of units, the same output from smaller layers, and refusals of what is no chain."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import lth_sparse as lth
from lth_sparse import models
from lth_sparse.masks import get_masks, masked_weights, set_masks_
from lth_sparse.structured import prune_units_, remove_units_


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomize(model, seed=0):
    """`model` masked, in float64 and evaluation mode, no parameter or statistic at a special value."""
    draw = seeded(seed)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draw)
                tensor.data.copy_(noise.abs() + 0.5 if name == "running_var" else noise)
    return lth.sparsify_(model.double()).eval()


def perceptron(*widths, act=nn.ReLU, norm=False, bias=True):
    layers = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs, bias=bias)] + [nn.BatchNorm1d(outputs)] * norm + [act()]
    return randomize(nn.Sequential(*[deepcopy(layer) for layer in layers[:-1]]))


def convolutions(act=nn.ReLU, padding=1, norm=False):
    conv1, conv2 = nn.Conv2d(2, 5, 3, padding=padding), nn.Conv2d(5, 4, 3, padding=padding, bias=not norm)
    norms = [nn.BatchNorm2d(5)] * norm, [nn.BatchNorm2d(4)] * norm
    size = (8 - 4 + 4 * padding) // 2
    features = nn.Sequential(conv1, *norms[0], act(), conv2, *norms[1], act(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4 * size**2, 6), act(), nn.Linear(6, 3))
    return randomize(nn.Sequential(OrderedDict(features=features, head=head)))


def prune_(model, **masks_off):
    """Prune what is marked: layer name (dots as `__`) -> index of weights that go."""
    masks = get_masks(model)
    for name, index in masks_off.items():
        masks[name.strip("_").replace("__", ".")][index] = False
    set_masks_(model, masks)
    return model


def images(model, seed=5):
    first = next(layer for layer in model.modules() if isinstance(layer, (nn.Linear, nn.Conv2d)))
    shape = (4, first.in_channels, 8, 8) if isinstance(first, nn.Conv2d) else (4, first.in_features)
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def widths(model):
    return [len(weight.parameter) for weight in masked_weights(model)]


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def removed(model, *inputs):
    """`model` after `remove_units_`, checked to be the same function with consistent layers and masks."""
    inputs = inputs or (images(model),)
    before, parameters = model(*inputs), count(model)
    assert remove_units_(model) is model
    torch.testing.assert_close(model(*inputs), before, rtol=1e-10, atol=1e-10)
    assert count(model) <= parameters
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert (layer.out_features, layer.in_features) == layer.weight.shape == layer.weight_mask.shape
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels) == layer.weight.shape[:2]
            assert layer.weight.shape == layer.weight_mask.shape
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert layer.num_features == len(layer.weight) == len(layer.running_var)
    assert not any(weight.parameter[~weight.mask].any() for weight in masked_weights(model))
    return model


def test_whole_units_of_lowest_mean_go_with_all_that_reads_them():
    model = lth.sparsify_(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
    model[0].weight.data.copy_(torch.tensor([[1.0, -0.4], [0.5, 0.2], [9.0, 1.2], [0.0, -3.0]]))
    prune_(model, _0=([2], [0]))  # unit 2 has a mean of 1.2 over its one weight, the others of 0.7, 0.35 and 1.5
    assert prune_units_(model, 0.5) is model
    assert get_masks(model)["0"].int().tolist() == [[0, 0], [0, 0], [0, 1], [1, 1]]
    assert get_masks(model)["2"].int().tolist() == [[0, 0, 1, 1]] * 2
    assert lth.density(model) == 7 / 16


def test_channels_go_with_their_pixels_behind_flatten():
    model = convolutions()
    for layer, values in ((model.features[0], [3, 1, 2, 5, 4]), (model.features[2], [4, 1, 2, 3])):
        layer.weight.data.copy_(torch.tensor(values)[:, None, None, None].expand_as(layer.weight))
    prune_units_(model, 0.4)
    masks = get_masks(model)
    assert masks["features.0"].flatten(1).all(1).tolist() == [True, False, False, True, True]
    assert (masks["features.2"].any(-1).any(-1).int().tolist()) == [[1, 0, 0, 1, 1], [0] * 5, [0] * 5, [1, 0, 0, 1, 1]]
    assert masks["head.2"].any(0).view(4, 16).int().tolist() == [[1] * 16, [0] * 16, [0] * 16, [1] * 16]
    assert masks["head.2"].any(1).sum() == masks["head.4"].any(0).sum() == 4
    assert masks["head.4"].any(1).all()


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=5),
    rates=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    levels=st.sampled_from([1, 2, 10**6]),
)
def test_exactly_round_of_rate_times_live_units_go_and_never_the_last(sizes, rates, levels):
    model = perceptron(*sizes)
    for weight in masked_weights(model):
        weight.parameter.data.copy_(torch.randint(1, levels + 1, weight.parameter.shape, generator=seeded()))
    live = sizes[1:-1]
    for rate in rates:
        before = get_masks(model)
        prune_units_(model, rate)
        live = [units - min(round(rate * units), units - 1) for units in live]
        masks = list(get_masks(model).values())
        assert [int(mask.any(1).sum()) for mask in masks] == [*live, sizes[-1]]
        assert [int(mask.any(0).sum()) for mask in masks] == [sizes[0], *live]
        assert not any((mask & ~was).any() for mask, was in zip(masks, before.values(), strict=True))
        assert lth.density(model) == sum(map(torch.sum, masks)) / sum(map(torch.numel, masks))
    assert widths(removed(model)) == [*live, sizes[-1]]
    assert lth.density(model) == 1


def test_dead_units_are_not_counted():
    model = perceptron(3, 10, 2)
    prune_(model, _0=[0, 1], _2=(slice(None), [2, 3]))  # two that read nothing, two that nothing reads
    prune_units_(model, 0.5)
    masks = get_masks(model)
    assert (masks["0"].any(1) & masks["2"].any(0)).sum() == 3 and masks["0"].any(1).sum() == 5


def test_ties_are_drawn_by_the_generator():
    def gone(**options):
        model = lth.sparsify_(nn.Sequential(nn.Linear(2, 20), nn.ReLU(), nn.Linear(20, 2)))
        nn.init.ones_(model[0].weight)
        return get_masks(prune_units_(model, 0.5, **options))["0"].any(1).tolist()

    assert gone() == gone() == gone(generator=seeded(0)) != gone(generator=seeded(1))


def test_excluded_layers_keep_their_units_and_lose_inputs():
    model = prune_units_(perceptron(4, 10, 10, 2), 0.5, exclude="2")
    masks = get_masks(model)
    assert masks["2"].any(1).all() and masks["2"].any(0).sum() == masks["0"].any(1).sum() == 5
    assert masks["4"].all()


def test_other_scores():
    initial = {"0": torch.arange(12.0).view(6, 2), "2": torch.ones(2, 6)}
    model = lambda: perceptron(2, 6, 2)  # noqa: E731
    kept = get_masks(prune_units_(model(), 0.5, lambda context: context.need("initial"), initial=initial))["0"]
    assert kept.any(1).tolist() == [False] * 3 + [True] * 3
    kept = get_masks(prune_units_(model(), 0.5, "large-init", initial=initial))["0"]
    assert kept.any(1).tolist() == [False] * 3 + [True] * 3
    stays = prune_units_(model(), 0.5, "stability", best={n: w.clone() for n, w in weights(model()).items()})
    assert lth.density(stays) == 1  # nothing has moved


def weights(model):
    return {weight.name: weight.parameter.detach() for weight in masked_weights(model)}


def test_a_reader_that_is_not_masked_gets_constants_which_fold():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    prune_units_(lth.sparsify_(model, exclude="2"), 0.5)
    before, sample = model[2].bias.clone(), images(model)
    want = model(sample)
    remove_units_(model)
    torch.testing.assert_close(model(sample), want, rtol=1e-12, atol=1e-12)
    assert model[0].weight.shape == (4, 3) and model[2].weight.shape == (2, 4) and type(model[2]) is nn.Linear
    assert not torch.equal(model[2].bias, before)


CHAINS = {
    "perceptron": lambda: perceptron(6, 9, 8, 4),
    "without biases": lambda: perceptron(6, 9, 8, 4, bias=False),
    "sigmoid": lambda: perceptron(6, 9, 8, 4, act=nn.Sigmoid),
    "batch norm": lambda: perceptron(6, 9, 8, 4, norm=True, act=nn.Tanh),
    "convolutions": convolutions,
    "convolutions, sigmoid": lambda: convolutions(act=nn.Sigmoid),
    "convolutions, no padding": lambda: convolutions(act=nn.Sigmoid, padding=0),
    "convolutions, batch norm": lambda: convolutions(norm=True),
    "convolutions, batch norm, no padding": lambda: convolutions(norm=True, act=nn.ELU, padding=0),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("rate", [0.3, 0.9, 0.97])
def test_removal_after_any_pruning_leaves_the_function(chain, rate):
    for seed in range(4):
        model = CHAINS[chain]()
        lth.prune_(model, rate, score="random", generator=seeded(seed))
        removed(model)
    model = CHAINS[chain]()
    parameters = count(model)
    assert count(removed(prune_units_(model, rate))) < parameters


@pytest.mark.parametrize("name", models.NAMES[:4] + ("vgg-19",))
def test_the_papers_chains_shrink_to_the_units_that_are_live(name):
    shape = (1, 16, 16) if name == "lenet-300-100" else (3, 16, 16)
    model = randomize(models.build(name, shape)).train()
    with torch.no_grad():  # statistics of their own, or vgg-19 would explode
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.weight.data *= layer.weight[0].numel() ** -0.5
    before, parameters = widths(model), count(model)
    sample = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
    removed(prune_units_(model.eval(), 0.5), sample)
    assert widths(model) == [n // 2 for n in before[:-1]] + before[-1:]
    assert count(model) < 0.55 * parameters and lth.density(model) == 1


def test_a_dead_unit_with_a_bias_goes_into_the_next_bias():
    model = prune_(perceptron(3, 4, 2, act=nn.Sigmoid), _0=[1])
    want = model[2].bias + model[2].weight[:, 1] * torch.sigmoid(model[0].bias[1])
    removed(model)
    assert widths(model) == [3, 2] and torch.allclose(model[2].bias, want)


def test_a_bias_is_made_where_there_was_none():
    model = prune_(perceptron(3, 4, 2, act=nn.Sigmoid, bias=False), _0=[1])
    model[2].weight.requires_grad_(False)
    assert removed(model)[2].bias.shape == (2,) and not model[2].bias.requires_grad
    tanh = prune_(perceptron(3, 4, 2, act=nn.Tanh, bias=False), _0=[1])  # the constant is 0
    assert removed(tanh)[2].bias is None and widths(tanh) == [3, 2]


def test_a_constant_before_a_padding_convolution_goes_only_if_it_is_0():
    model = prune_(convolutions(), features__0=[1, 3])
    model.features[0].bias.data[[1, 3]] = torch.tensor([2.0, -2.0], dtype=torch.float64)
    assert widths(removed(model))[0] == 4  # relu(-2) is 0, and a 2 counts for less at the border
    inner = prune_(convolutions(padding=0), features__0=[1, 3])
    inner.features[0].bias.data[[1, 3]] = torch.tensor([2.0, -2.0], dtype=torch.float64)
    assert widths(removed(inner))[0] == 3


def test_a_constant_channel_folds_through_pooling_and_flatten_into_a_linear():
    model = prune_(convolutions(act=nn.Sigmoid), features__2=[0, 2])
    assert widths(removed(model)) == [5, 2, 6, 3] and model.head[2].weight.shape == (6, 32)


def test_a_constant_passes_batch_norm():
    model = prune_(perceptron(3, 4, 2, norm=True, act=nn.Tanh), _0=[1])
    norm = model[1]
    scaled = (model[0].bias - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    want = model[3].bias + model[3].weight[:, 1] * torch.tanh(scaled)[1]
    removed(model)
    assert widths(model) == [3, 2] and torch.allclose(model[3].bias, want) and model[1].num_features == 3


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_batch_norm_of_other_kinds(options):
    flat = [
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, **options),
        nn.ReLU(),
        nn.Flatten(),
        nn.BatchNorm1d(4 * 36, **options),
    ]
    model = prune_(randomize(nn.Sequential(*flat, nn.Linear(4 * 36, 3))), _0=[2])
    sample = images(model)
    want = model(sample)
    torch.testing.assert_close(remove_units_(model)(sample), want, rtol=1e-10, atol=1e-10)
    assert widths(model) == [3, 3] and (model[1].num_features, model[4].num_features) == (3, 108)


def test_units_that_only_unread_units_read_go_too():
    model = perceptron(4, 6, 6, 2)
    prune_(model, _4=(slice(None), slice(1, 6)), _2=(0, slice(2, 6)))  # one unit left, which reads two
    assert widths(removed(model)) == [2, 1, 2]


def test_units_that_read_only_constants_go_too():
    model = perceptron(4, 6, 6, 2)
    prune_(model, _0=slice(1, 6), _2=(slice(2, 6), 0))  # one unit lives, and two read it
    assert widths(removed(model)) == [1, 2, 2]


@pytest.mark.parametrize("chain", ["perceptron", "convolutions", "convolutions, batch norm"])
@pytest.mark.parametrize("dead", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_layer_without_weights_keeps_a_unit(chain, dead):
    model = CHAINS[chain]()
    names = [weight.name for weight in masked_weights(model)]
    masks = get_masks(model)
    set_masks_(model, {name: mask & (names.index(name) not in dead) for name, mask in masks.items()})
    removed(model)
    assert min(widths(model)) >= 1


def test_nothing_dead_changes_nothing():
    model = perceptron(4, 5, 3)
    parameters = list(model.parameters())
    assert all(new is old for new, old in zip(removed(model).parameters(), parameters, strict=True))


def test_a_write_that_no_forward_has_seen_is_not_folded():
    model = prune_(perceptron(3, 4, 2, act=nn.Sigmoid), _0=[1], _2=([0], [1]))
    clean = deepcopy(model)
    with torch.no_grad():
        model[2].weight[0, 1] = 7
    assert torch.equal(remove_units_(model)[2].bias, remove_units_(clean)[2].bias)


def test_the_small_model_trains_stays_masked_and_is_saved(tmp_path):
    model = perceptron(4, 8, 8, 2)
    lth.prune_(prune_units_(model, 0.5), 0.3)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    removed(model).train()
    model(images(model)).square().sum().backward()
    with pytest.raises(ValueError, match="make a new optimizer"):
        old.step()
    before = weights(deepcopy(model))
    torch.optim.Adam(model.parameters()).step()
    for name, weight in weights(model).items():
        mask = get_masks(model)[name]
        assert not mask.all() and not weight[~mask].any() and not torch.equal(weight, before[name])
    lth.save(model, tmp_path / "small.safetensors")
    again = lth.load_(perceptron(4, *widths(model)), tmp_path / "small.safetensors")
    assert torch.equal(again(images(model)), model.eval()(images(model)))
    plain = lth.densify_(deepcopy(model))
    assert type(plain[0]) is nn.Linear and torch.equal(plain(images(model)), model(images(model)))


class Residual(nn.Sequential):
    def forward(self, input):
        return input + super().forward(input)


TWICE = nn.Linear(4, 4)
STRANGE = {
    "'1', a Residual": [nn.Linear(4, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 2)],
    "'0', a Residual": [Residual(nn.Linear(4, 4)), nn.Linear(4, 2)],
    "'1', a Softmax": [nn.Linear(4, 4), nn.Softmax(1), nn.Linear(4, 2)],
    "'1', a LayerNorm": [nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)],
    "'1.0', a PReLU": [nn.Linear(4, 4), nn.Sequential(nn.PReLU()), nn.Linear(4, 2)],
    "'2', which shares a parameter with a layer before it": [TWICE, nn.ReLU(), TWICE],
    "'1', a convolution in groups": [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=4)],
    "how '1' reads '0'": [nn.Conv2d(4, 4, 1), nn.Linear(4, 2)],
    "how '2' reads '0'": [nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 2)],
    "'1', which does not flatten everything but the batch": [nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(4, 2)],
    "'1', whose average of a constant is another number": [
        *(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2, padding=1), nn.Conv2d(4, 4, 1)),
    ],
    "'1', whose weight is recomputed in every forward": [
        *(nn.Linear(4, 4), prune.identity(nn.Linear(4, 4), "weight"), nn.Linear(4, 2)),
    ],
}


@pytest.mark.parametrize("verb", [prune_units_, remove_units_])
@pytest.mark.parametrize("what", STRANGE)
def test_what_is_no_chain_is_refused_by_name(what, verb):
    model = lth.sparsify_(nn.Sequential(*STRANGE[what]))
    with pytest.raises(
        ValueError, match=f"^{verb.__name__} follows nn.Sequential chains of .*: it cannot follow {what}$"
    ):
        verb(model)
    assert lth.density(model) == 1


@pytest.mark.parametrize("verb", [prune_units_, remove_units_])
def test_other_refusals(verb):
    with pytest.raises(ValueError, match=f"{verb.__name__} .* it cannot follow 'block1', a Block$"):
        verb(lth.sparsify_(models.build("resnet-18", (3, 8, 8))))
    with pytest.raises(ValueError, match="it cannot follow the model, a Residual$"):
        verb(lth.sparsify_(Residual(nn.Linear(4, 4))))
    with pytest.raises(ValueError, match="the model has no masked layers"):
        verb(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    packed = lth.pack_(perceptron(4, 4, 2).float(), strategies={"0": "cpu"})
    with pytest.raises(ValueError, match="'0' is packed"):
        verb(packed)
    frozen = prune_(perceptron(4, 4, 2), _0=1)
    frozen[0].register_buffer("weight_frozen", (~frozen[0].weight_mask).double())
    with pytest.raises(ValueError, match="it cannot follow '0', which has frozen weights$"):
        verb(frozen)
    captured = perceptron(4, 4, 2)
    captured[0].captured = True
    with pytest.raises(ValueError, match="captured CUDA graph"):
        verb(captured)


def test_wrong_options_are_refused():
    model = perceptron(4, 4, 2)
    with pytest.raises(ValueError, match=r"^rate must lie in \(0, 1\), got 1$"):
        prune_units_(model, 1)
    with pytest.raises(ValueError, match="^no layer matches 'head'"):
        prune_units_(model, exclude=["head"])
    with pytest.raises(ValueError, match="^prune_units_ has nothing to prune"):
        prune_units_(model, exclude=["0"])
    with pytest.raises(ValueError, match="^prune_units_ has nothing to prune"):
        prune_units_(lth.sparsify_(nn.Linear(2, 2)))
    assert lth.density(model) == 1


def test_strangers_without_parameters_may_stand_at_both_ends():
    model = lth.sparsify_(nn.Sequential(nn.Softmax(1), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.LogSoftmax(1)))
    sample = torch.randn(3, 4, generator=seeded())
    want = prune_units_(model, 0.5)(sample)
    torch.testing.assert_close(remove_units_(model)(sample), want)
    assert widths(model) == [4, 2]
