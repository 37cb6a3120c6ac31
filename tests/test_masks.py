"""Masks of a whole model: what is frozen off them, and their algebra."""

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.masks import difference, freeze_, get_masks, intersection, masked_weights, set_masks_, union


def model():
    torch.manual_seed(0)
    return lth.prune_(lth.sparsify_(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 2, 2))), 0.5)


def values(network):
    return {name: torch.full(mask.shape, 2.0) for name, mask in get_masks(network).items()}


def test_frozen_values_count_off_the_mask_and_are_taken_away():
    network = model()
    given = values(network)
    assert freeze_(network, given) is network and lth.density(network) == 0.5
    for weight in masked_weights(network):
        assert torch.equal(weight.frozen, 2.0 * ~weight.mask) and not weight.frozen.requires_grad
        assert torch.equal(weight.parameter.detach(), weight.parameter.detach() * weight.mask)
    given["0"].fill_(7)
    assert network[0].weight_frozen.max() == 2  # a copy
    freeze_(network, {"1": 3 * given["1"]})
    assert network[0].weight_frozen.max() == 2 and network[1].weight_frozen.max() == 6
    freeze_(network, {"1": torch.zeros(2, 1, 2, 2)})
    assert not hasattr(network[1], "weight_frozen") and masked_weights(network)[1].frozen is None
    freeze_(network, None)
    assert not any("frozen" in name for name in network.state_dict())


def test_frozen_weights_stay_when_more_is_pruned_and_give_way_to_masks():
    network = freeze_(model(), values(model()))
    before = network[0].weight_frozen.clone()
    lth.prune_(network, 0.5)
    assert torch.equal(network[0].weight_frozen, before) and (before != 0).sum() == 6
    assert network[0].weight_mask.sum() == 3  # newly pruned weights are zero
    assert (network[0].weight + network[0].weight_frozen != 0).sum() == 9
    network[0].weight_frozen.fill_(1)
    lth.sync_(network)
    assert torch.equal(network[0].weight_frozen, 1.0 * ~network[0].weight_mask)
    set_masks_(network, {name: torch.ones_like(mask) for name, mask in get_masks(network).items()})
    assert all(weight.frozen is None for weight in masked_weights(network))


def test_tied_layers_compute_with_the_same_frozen_values():
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    network[1].weight = network[0].weight
    lth.prune_(lth.sparsify_(network), 0.5)
    freeze_(network, {"0": torch.ones(3, 3)})
    x, want = torch.eye(3), torch.where(network[0].weight_mask, network[0].weight, 1).T
    assert torch.equal(network(x), want @ want)
    assert torch.equal(lth.densify_(network)(x), want @ want) and type(network[1]) is nn.Linear


@pytest.mark.parametrize(
    "given, message",
    [
        ({"0": torch.ones(3, 4), "2": torch.ones(1)}, "for '2', which is not masked: 0, 1 can be named"),
        ({"0": torch.ones(3, 4), "1": torch.ones(2, 2)}, r"shape \(2, 2\) for '1', wanted shape \(2, 1, 2, 2\)"),
    ],
)
def test_values_that_do_not_fit_are_refused_and_change_nothing(given, message):
    network = model()
    with pytest.raises(ValueError, match=f"^freeze_ got values .*{message}$"):
        freeze_(network, given)
    assert all(weight.frozen is None for weight in masked_weights(network))


def test_layers_that_cannot_freeze():
    attention = lth.prune_(lth.sparsify_(nn.MultiheadAttention(4, 2)), 0.5)
    for name, mask in get_masks(attention).items():
        with pytest.raises(ValueError, match=f"^freeze_ got values for '{name}', but weights of attention"):
            freeze_(attention, {name: torch.ones(mask.shape)})
    freeze_(attention, None)
    packed = lth.pack_(lth.prune_(lth.sparsify_(nn.Linear(4, 4)), 0.5), strategies={"": "cpu"})
    with pytest.raises(ValueError, match="^freeze_ changes masks or values, but '' is packed"):
        freeze_(packed, {"weight": torch.ones(4, 4)})
    network = model()
    network[1].captured = True
    with pytest.raises(ValueError, match="^freeze_ would change masks or frozen weights of a layer under a captured"):
        freeze_(network, values(network))
    assert not hasattr(network[0], "weight_frozen")


def test_frozen_layers_are_not_packed():
    network = freeze_(model(), {"1": torch.ones(2, 1, 2, 2)})
    with pytest.raises(ValueError, match=r"but a MaskedConv2d of shape \(2, 1, 2, 2\) has frozen ones: .*freeze_"):
        lth.pack_(network, strategies={"0": "cpu"})
    assert network[0].weight_mask is masked_weights(network)[0].mask
    lth.pack_(freeze_(network, None), strategies={"0": "cpu"})


def test_algebra_of_masks():
    a = {"x": torch.tensor([True, True, False, False]), "y": torch.tensor([[True]])}
    b = {"x": torch.tensor([True, False, True, False]), "y": torch.tensor([[False]])}
    want = {union: [1, 1, 1, 0], intersection: [1, 0, 0, 0], difference: [0, 1, 0, 0]}
    for operator, kept in want.items():
        got = operator(a, b)
        assert list(got) == ["x", "y"] and all(mask.dtype == torch.bool for mask in got.values())
        assert got["x"].tolist() == [bool(keep) for keep in kept]
        assert got["y"].item() == (operator is not intersection)
    set_masks_(network := model(), union(get_masks(network), get_masks(model())))
    assert lth.density(network) == 0.5


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda masks: masks.pop("0"), r"'0' has no such entry in one, shape \(3, 4\) in the other"),
        (lambda masks: masks.update({"2": masks["0"]}), r"'2' has shape \(3, 4\) in one, no such entry in the other"),
        (
            lambda masks: masks.update({"0": masks["0"].T}),
            r"'0' has shape \(4, 3\) in one, shape \(3, 4\) in the other",
        ),
    ],
)
@pytest.mark.parametrize("operator", [union, intersection, difference])
def test_masks_of_two_models_are_not_combined(operator, change, message):
    masks = get_masks(model())
    change(masks)
    with pytest.raises(ValueError, match=f"^the masks are not of one model: {message}$"):
        operator(masks, get_masks(model()))
