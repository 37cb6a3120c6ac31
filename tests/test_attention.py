"""Attention: torch reads its weights past any forward of ours, and they stay masked all the same."""

import copy
import pickle

import pytest
import torch
from masked_models import assert_clean, images, pruned, train
from torch import nn
from torch.func import functional_call

import lth_sparse as lth
from lth_sparse.masks import masked_weights


def attention(kind):
    torch.manual_seed(0)
    options = {
        "same": {},
        "batch first": {"batch_first": True, "bias": False},
        "other dims": {"kdim": 6, "vdim": 10},
        "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
    }[kind]
    key, value = images(3, 2, options.get("kdim", 8)), images(3, 2, options.get("vdim", 8))
    return nn.MultiheadAttention(8, 2, **options), (images(3, 2, 8), key, value)


every_attention = pytest.mark.parametrize("kind", ["same", "batch first", "other dims", "extra keys"])


@every_attention
@pytest.mark.parametrize("exclude", [[], ["out_proj"]], ids=["", "out_proj excluded"])
def test_attention_is_that_of_the_dense_module(kind, exclude):
    model, inputs = attention(kind)
    want = model(*inputs)[0]
    lth.sparsify_(model, exclude=exclude)
    assert torch.equal(model(*inputs)[0], want)
    assert isinstance(model.out_proj, nn.Linear) and hasattr(model.out_proj, "weight_mask") != bool(exclude)
    lth.prune_(model, 0.5)
    dense = lth.densify_(copy.deepcopy(model))
    for module in (model, dense):
        module.zero_grad()
        module(*inputs)[0].square().sum().backward()
    assert torch.equal(model(*inputs)[0], dense(*inputs)[0])
    masks = {weight.name: weight.mask for weight in masked_weights(model)}
    assert len(masks) == (3 if kind == "other dims" else 1) + (not exclude)
    for name, p in dense.named_parameters():
        mask = masks.get(name.removesuffix(".weight"), torch.ones(()))
        assert torch.equal(model.get_parameter(name).grad, p.grad * mask)
    train(model, *inputs)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@every_attention
def test_copied_attention_never_regrows(kind, copied):
    model, inputs = attention(kind)
    train(copied(train(pruned(model), *inputs)), *inputs)


@pytest.mark.parametrize("how", ["init", "no_grad", "assign", "frozen", "data"])
def test_written_attention_is_masked_in_the_next_forward(how):
    model, inputs = attention("same")
    pruned(model)
    for name, layer in (("in_proj_weight", model), ("weight", model.out_proj)):
        weight, mask = getattr(layer, name), getattr(layer, name + "_mask")
        with torch.no_grad():
            if how == "assign":
                setattr(layer, name, nn.Parameter(torch.ones_like(weight)))
            else:
                weight.requires_grad_(how != "frozen")
                nn.init.ones_(weight.data if how == "data" else weight)
        if how == "data":
            lth.sync_(model)
        model(*inputs)
        assert torch.equal(getattr(layer, name).detach(), mask.float())
        getattr(layer, name).requires_grad_(True)
    train(model, *inputs)


def test_attention_masks_handed_in_tensors_and_never_writes_them():
    model, inputs = attention("same")
    given = {name: torch.ones_like(p) for name, p in pruned(model).named_parameters()}
    dense = lth.densify_(copy.deepcopy(model))
    masked = dict(given, in_proj_weight=model.in_proj_weight_mask * 1.0)
    masked["out_proj.weight"] = model.out_proj.weight_mask * 1.0
    assert torch.equal(functional_call(model, given, inputs)[0], functional_call(dense, masked, inputs)[0])
    assert all((p == 1).all() for p in given.values())
    gradient = torch.func.grad(lambda p: functional_call(model, p, inputs)[0].square().sum())(given)
    assert (gradient["in_proj_weight"][~model.in_proj_weight_mask] == 0).all()
    assert gradient["in_proj_weight"].any() and isinstance(model.in_proj_weight, nn.Parameter)


def test_hooks_outlive_neither_masks_nor_layer():
    model, inputs = attention("same")
    weight = pruned(model).in_proj_weight
    lth.densify_(model)(*inputs)[0].square().sum().backward()
    assert weight.grad[weight == 0].all() and (weight == 0).any()
    del model
    weight.square().sum().backward()


@pytest.mark.parametrize("sparse_first", [True, False])
def test_transformer_encoder_and_its_fast_path(sparse_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(lth.sparsify_(layer) if sparse_first else layer, 2, enable_nested_tensor=False)
    x = images(3, 5, 8)
    for _ in range(2):
        model = copy.deepcopy(train(pruned(model).train(), x)).eval()
        dense = lth.densify_(copy.deepcopy(model))
        slow = model(x)
        with torch.inference_mode():
            fast = model(x)
        assert torch.equal(slow, dense(x)) and not torch.equal(slow, fast)  # another order of sums: it is another path
        torch.testing.assert_close(slow, fast)
    assert len(masked_weights(model)) == 8 and lth.density(model) == pytest.approx(0.25, abs=0.01)


def test_attention_compiles():
    model, inputs = attention("same")
    model = copy.deepcopy(pruned(model))  # whose hooks no forward has put back yet
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(*inputs)[0].square().sum().backward()
    assert_clean(model)
    train(compiled, *inputs)
    torch.testing.assert_close(compiled(*inputs)[0], model(*inputs)[0])
