"""State dicts: masks travel with them, and a state without masks leaves a layer its own."""

import copy
import warnings

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.masks import freeze_, get_masks, masked_weights


def network():
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 5)})


def run(model):
    model.eval()
    return model["head"](model["norm"](model["conv"](torch.ones(2, 1, 6, 6))).mean((2, 3)))


def load_warnings(model, state, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.load_state_dict(state, **options)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("assign", [False, True])
def test_a_masked_state_brings_its_masks(assign):
    source, target = (lth.prune_(lth.sparsify_(network()), rate) for rate in (0.3, 0.8))
    state = copy.deepcopy(source).state_dict()
    state["head.weight"][~state["head.weight_mask"]] = 7  # with masks of its own, a state says what to drop
    assert load_warnings(target, state, assign=assign) == []
    assert torch.equal(run(target), run(source)) and lth.density(target) == lth.density(source) < 0.72
    lth.prune_(target, 0.5)
    run(target).sum().backward()
    for weight in masked_weights(target):
        assert (weight.parameter[~weight.mask] == 0).all() and (weight.parameter.grad[~weight.mask] == 0).all()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_dense_state_leaves_the_masks_and_warns_once(assign, strict):
    source, target = network(), lth.prune_(lth.sparsify_(network()), 0.5)
    nn.init.ones_(source["head"].weight)
    masks = {weight.name: weight.mask.clone() for weight in masked_weights(target)}
    (message,) = load_warnings(target, source.state_dict(), assign=assign, strict=strict)
    assert message == "the state dict brings no masks: masked layers keep theirs and drop the values off them"
    for weight in masked_weights(target):
        assert torch.equal(weight.mask, masks[weight.name])
        assert torch.equal(weight.parameter.detach(), source.get_submodule(weight.name).weight * weight.mask)
    assert load_warnings(target, lth.densify_(copy.deepcopy(target)).state_dict()) == []  # nothing is dropped


def test_missing_and_unexpected_entries_are_still_reported():
    model = lth.sparsify_(network())
    state = model.state_dict()
    del state["head.weight"], state["head.weight_mask"]
    with pytest.raises(RuntimeError, match='Missing key.*"head.weight"') as error:
        model.load_state_dict(state)
    assert "mask" not in str(error.value)
    missing, unexpected = model.load_state_dict(state | {"extra": torch.ones(1)}, strict=False)
    assert missing == ["head.weight"] and unexpected == ["extra"]
    with pytest.raises(RuntimeError, match='Unexpected key.*"head.weight_mask"'):
        network().load_state_dict(model.state_dict())


def test_masks_of_other_dtypes_load_as_bool():
    source, target = lth.prune_(lth.sparsify_(network()), 0.5), lth.sparsify_(network())
    state = {name: value.float() if "mask" in name else value for name, value in source.state_dict().items()}
    for assign in (False, True):
        target.load_state_dict(state, assign=assign)
        assert target["head"].weight_mask.dtype == torch.bool and lth.density(target) == lth.density(source)


def frozen():
    model = lth.prune_(lth.sparsify_(network()), 0.5)
    return freeze_(model, {name: torch.full(mask.shape, 3.0) for name, mask in get_masks(model).items()})


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("before", ["none", "others"])
def test_a_state_brings_its_frozen_weights(before, assign):
    source, target = frozen(), lth.prune_(lth.sparsify_(network()), 0.8)
    if before == "others":
        freeze_(target, {name: torch.ones(mask.shape) for name, mask in get_masks(target).items()})
    state = {name: value.clone() for name, value in source.state_dict().items()}
    assert {"conv.weight_frozen", "head.weight_frozen"} < set(state)
    state["head.weight_frozen"].fill_(3)  # zero on the mask whatever the state says
    assert load_warnings(target, state, assign=assign) == []
    assert torch.equal(run(target), run(source)) and target.state_dict().keys() == source.state_dict().keys()
    assert torch.equal(target["head"].weight_frozen, 3.0 * ~source["head"].weight_mask)


def test_a_state_with_masks_and_nothing_frozen_takes_what_is_frozen_away():
    target, source = frozen(), lth.prune_(lth.sparsify_(network()), 0.5)
    target.load_state_dict(source.state_dict())
    assert torch.equal(run(target), run(source)) and not hasattr(target["head"], "weight_frozen")


@pytest.mark.parametrize("strict", [False, True])
def test_a_dense_state_leaves_what_is_frozen_as_it_leaves_the_masks(strict):
    target, source = frozen(), frozen()
    (message,) = load_warnings(target, lth.densify_(copy.deepcopy(source)).state_dict(), strict=strict)
    assert message.startswith("the state dict brings no masks") and torch.equal(run(target), run(source))
    target.load_state_dict({"head.bias": torch.ones(5)}, strict=False)
    assert target["head"].bias.sum() == 5 and target["head"].weight_frozen.any()


def test_a_frozen_state_is_not_for_attention_or_layers_without_masks():
    for model in (network(), lth.sparsify_(nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)}))):
        name = "head.weight_frozen" if "head" in model else "attention.out_proj.weight_frozen"
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
            model.load_state_dict(model.state_dict() | {name: torch.ones(5, 4)})


@pytest.mark.parametrize("strict", [False, True])
def test_a_frozen_state_is_not_for_packed_layers(strict):
    state = frozen().state_dict()
    packed = lth.pack_(lth.prune_(lth.sparsify_(network()), 0.5), strategies={"head": "cpu"})
    values = packed["head"].values.detach().clone()
    state["head.weight"] = 2 * state["head.weight"]
    with pytest.raises(RuntimeError, match=r"\shead\.weight_frozen is for a masked layer: call unpack_\(model\) first"):
        packed.load_state_dict(state, strict=strict)
    assert torch.equal(packed["head"].values, values)
    lth.unpack_(packed).load_state_dict(state)
    assert torch.equal(packed["head"].weight_frozen, state["head.weight_frozen"])
