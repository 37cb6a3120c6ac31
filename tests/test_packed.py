"""Packed layers: nnz-long parameters, the masked layer's numbers, and its state dict."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.packed import PackedLinear

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.fixture(autouse=True, params=["cpu", "dense"])
def strategy(request, monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", request.param)
    return request.param


def network(density=0.3, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10, bias=False)).to(dtype)
    return lth.prune_(lth.sparsify_(model), 1 - density)


def train(model, make, steps=50):
    optimizer, generator = make(model.parameters()), torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(7, 20, generator=generator, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_trajectory_is_that_of_the_masked_state(make):
    masked, oracle = network(), network(dtype=torch.float64)
    packed = lth.pack_(copy.deepcopy(masked))
    before = masked[0].weight.clone()
    for model in (masked, packed, oracle):
        train(model, make)
    assert (masked[0].weight - before).abs().max() > 0.01
    for i in (0, 2):
        error = (masked[i].weight - oracle[i].weight).abs().max()
        assert (packed[i].weight - oracle[i].weight).abs().max() <= 2 * error + 1e-7
        assert not packed[i].weight[~masked[i].weight_mask].any()


def test_gradient_and_state_are_as_long_as_what_is_kept():
    model = lth.pack_(network())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    assert [tuple(p.shape) for p in model.parameters()] == [(180,), (30,), (90,)]
    assert model[0].values.grad.shape == optimizer.state[model[0].values]["exp_avg"].shape == (180,)


@pytest.mark.parametrize("rows", [(), (0,), (1,), (60,), (257,), (2, 3)])
@pytest.mark.parametrize("make_mask", ["empty", "row and column", "one", "full"])
def test_values_and_gradients_err_no_more_than_the_masked_layer(rows, make_mask):
    masked = lth.sparsify_(nn.Linear(33, 17))
    mask = torch.ones(17, 33, dtype=torch.bool)
    if make_mask == "row and column":
        mask[3], mask[:, 5] = False, False
    elif make_mask in ("empty", "one"):
        mask.fill_(False)[2, 4] = make_mask == "one"
    masked.weight_mask.copy_(mask)
    masked.sync_()
    oracle, packed = copy.deepcopy(masked).double(), lth.pack_(copy.deepcopy(masked))
    assert isinstance(packed, PackedLinear)
    x = torch.randn(*rows, 33)
    found = []
    for layer in (oracle, masked, packed):
        given = x.to(layer.bias.dtype).requires_grad_()
        output = layer(given)
        output.sin().sum().backward()
        weight = packed.values.grad if layer is packed else layer.weight.grad[mask]
        found.append([output.detach(), given.grad, weight, layer.bias.grad])
    for wanted, theirs, ours in zip(*found, strict=True):
        scale = wanted.abs().max() if wanted.numel() else 0
        allowed = 2 * (theirs - wanted).abs().max() if wanted.numel() else 0
        assert ours.shape == wanted.shape and ((ours - wanted).abs() <= allowed + 1e-6 * scale).all()


def test_state_dicts_are_those_of_the_masked_state():
    masked = network()
    packed = lth.pack_(copy.deepcopy(masked))
    assert list(packed.state_dict()) == list(masked.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(packed.state_dict().values(), masked.state_dict().values(), strict=True)
    )
    train(packed, OPTIMIZERS["adam"])
    masked.load_state_dict(packed.state_dict())
    assert torch.equal(masked[0].weight, packed[0].weight)
    other = lth.pack_(network())
    other.load_state_dict(masked.state_dict())
    assert torch.equal(other[0].values, packed[0].values)


def test_another_mask_is_refused():
    packed = lth.pack_(network())
    other = lth.prune_(network(), 0.5)
    with pytest.raises(RuntimeError, match=r"0\.weight has another shape or mask.*unpack_"):
        packed.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        packed.load_state_dict({})


def test_unpack_undoes_pack():
    model = network()
    state = copy.deepcopy(model.state_dict())
    lth.unpack_(lth.pack_(model))
    assert type(model[0]).__name__ == "MaskedLinear" and list(dict(model.named_parameters())) == [
        *("0.weight", "0.bias", "2.weight")
    ]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    lth.prune_(model, 0.5)
    train(model, OPTIMIZERS["sgd"], steps=3)
    assert lth.density(model) == pytest.approx(0.15)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(copier):
    model = lth.pack_(network())
    other, x = copier(model), torch.randn(4, 20)
    assert torch.equal(other(x), model(x))
    train(other, OPTIMIZERS["sgd"], steps=2)
    assert not torch.equal(other(x), model(x))


def test_functional_call_computes_from_the_values_given():
    model, x = lth.pack_(network()), torch.randn(4, 20)
    doubled = {name: 2 * p.detach() for name, p in model.named_parameters()}
    hidden = nn.functional.linear(x, 2 * model[0].weight, 2 * model[0].bias).relu()
    expected = nn.functional.linear(hidden, 2 * model[2].weight)
    assert torch.allclose(torch.func.functional_call(model, doubled, (x,)), expected, atol=1e-5)


def test_compiles_without_a_graph_break():
    model, x = lth.pack_(network()), torch.randn(4, 20)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_a_layer_called_twice_in_one_step():
    layer = lth.prune_(lth.sparsify_(nn.Linear(12, 12)), 0.7)
    packed, x = lth.pack_(copy.deepcopy(layer)), torch.randn(5, 12)
    for model in (layer, packed):
        model(model(x)).sum().backward()
    torch.testing.assert_close(packed.values.grad, layer.weight.grad[layer.weight_mask])


def test_moves_its_structures_with_it(strategy):
    layer = lth.pack_(network())[0].to("meta")
    assert all(index.is_meta for index in layer.pattern) and layer.bits.is_meta
    assert strategy == "cpu" or layer.shadow.is_meta


def test_sync_refreshes_the_shadow_after_writes_by_hand(strategy):
    model, x = lth.pack_(network()), torch.randn(4, 20)
    before = model(x)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.values.mul_(2)
    assert not torch.allclose(lth.sync_(model)(x), before)
    torch.testing.assert_close(model(x), lth.unpack_(copy.deepcopy(model))(x))


def test_an_optimizer_older_than_pack_is_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lth.pack_(model)(torch.randn(3, 20)).sum().backward()
    with pytest.raises(ValueError, match=r"SGD holds a weight that pack_ or unpack_ has replaced"):
        optimizer.step()


def test_optimizers_that_mix_entries_are_refused():
    model = lth.pack_(network())
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ValueError, match="LBFGS is not known to be elementwise"):
        optimizer.step(lambda: model(torch.randn(3, 20)).sum())


@pytest.mark.parametrize(
    "call",
    [lambda m: lth.prune_(m, 0.5), lambda m: lth.rewind_(m, {}), lambda m: lth.reinit_(m, torch.Generator())],
    ids=["prune_", "rewind_", "reinit_"],
)
def test_verbs_that_change_masks_or_values_ask_to_unpack(call):
    with pytest.raises(ValueError, match="packed.*unpack_"):
        call(lth.pack_(network()))


def test_density_summary_and_save_see_through_packing(tmp_path, strategy):
    model = network()
    packed = lth.pack_(copy.deepcopy(model))
    assert lth.density(packed) == lth.density(model)
    rows = {row.name: row for row in lth.summary(packed)}
    assert (rows["0.weight"].state, rows["0.weight"].strategy, rows["0.weight"].kept) == ("packed", strategy, 180)
    lth.save(packed, tmp_path / "a.safetensors")
    lth.save(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert isinstance(packed[0], PackedLinear) and isinstance(packed[0], nn.Linear)
