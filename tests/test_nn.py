"""Masked layers: the result and the gradients of a dense layer with zeros in it, for every kind of layer."""

import copy
import pickle

import pytest
import torch
from masked_models import assert_clean, images, network, pruned, train
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import lth_sparse as lth
from lth_sparse.masks import freeze_, masked_weights
from lth_sparse.nn import MASKED_CLASSES, MaskedLinear

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear 3d": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=2, padding_mode="circular"), (2, 4, 11)),
    "conv1d same": (lambda: nn.Conv1d(2, 3, 3, padding="same", bias=False), (2, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2, padding_mode="reflect"), (2, 4, 7, 8)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, dilation=(1, 2, 1), padding=1, padding_mode="circular"), (1, 2, 4, 5, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=(1, 0)), (2, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (1, 2, 3, 3, 2)),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)


def build(kind):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    return make(), torch.randn(shape, requires_grad=True)


@every_layer
@pytest.mark.parametrize("rate", [None, 0.5, 0.95])
def test_output_and_gradients_are_those_of_the_dense_layer(kind, rate):
    layer, x = build(kind)
    dense, masked = copy.deepcopy(layer), lth.sparsify_(layer)
    if rate:
        lth.prune_(masked, rate)
        dense.weight.data *= masked.weight_mask
    options = [{}]
    if "transposed" in kind:
        pads = zip(dense(x).shape[2:], dense.output_padding, strict=True)
        options.append({"output_size": [size + 1 - 2 * pad for size, pad in pads]})
    for option in options:
        ours, theirs = masked(x, **option), dense(x, **option)
        assert torch.equal(ours, theirs)
        cotangent = images(*ours.shape)
        parameters = [[x, *module.parameters()] for module in (masked, dense)]
        got, want = (torch.autograd.grad(y, p, cotangent) for y, p in zip((ours, theirs), parameters, strict=True))
        assert torch.equal(got[1], want[1] * masked.weight_mask) and want[1][~masked.weight_mask].any() == bool(rate)
        assert all(torch.equal(a, b) for a, b in zip(got[::2], want[::2], strict=True))


def frozen(model):
    """`model` with everything that is pruned frozen at values of its own."""
    generator = torch.Generator().manual_seed(2)
    return freeze_(model, {w.name: torch.randn(w.mask.shape, generator=generator) for w in masked_weights(model)})


@every_layer
def test_frozen_weights_compute_as_dense_ones_without_gradient(kind):
    layer, x = build(kind)
    layer, x = frozen(pruned(layer.double())), x.detach().double().requires_grad_()
    dense, mask = lth.densify_(copy.deepcopy(layer)), layer.weight_mask
    assert torch.equal(dense.weight.detach(), torch.where(mask, layer.weight, layer.weight_frozen))
    assert dense.weight.all() and layer.weight_frozen.dtype == torch.float64
    ours, theirs = layer(x), dense(x)
    assert torch.equal(ours, theirs)
    cotangent = images(*ours.shape).double()
    parameters = [[x, *module.parameters()] for module in (layer, dense)]
    got, want = (torch.autograd.grad(y, p, cotangent) for y, p in zip((ours, theirs), parameters, strict=True))
    assert torch.equal(got[1], want[1] * mask) and want[1][~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(got[::2], want[::2], strict=True))
    before = layer.weight_frozen.clone()
    train(layer, x.detach())
    assert torch.equal(layer.weight_frozen, before) and layer.weight_frozen.grad is None


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_frozen_layers_are_moved_copied_written_and_called_as_functions(kind):
    layer, x = build(kind)
    layer, x = frozen(pruned(layer)), x.detach()
    want = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double().float()):
        assert torch.equal(twin(x), want) and twin.weight_frozen is not layer.weight_frozen
    assert torch.equal(functional_call(layer, {"weight": layer.weight.detach().clone()}, x), want)
    doubled = functional_call(layer, {"weight_frozen": 2 * layer.weight_frozen}, x)
    assert doubled.shape == want.shape and not torch.equal(doubled, want)
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight_frozen.dtype == half(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        layer.weight[~layer.weight_mask] = 7  # is masked in the next forward, and what is frozen stays
    assert torch.equal(layer(x), want)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    assert torch.equal(layer(x), want)


def test_frozen_layers_compile_to_one_graph_and_train():
    layer, x = build("linear")
    frozen(pruned(layer))
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), x.detach()
    assert torch.equal(compiled(x), layer(x))
    train(compiled, x)
    assert torch.equal(compiled(x), layer(x))


@every_layer
def test_training_never_regrows(kind):
    layer, x = build(kind)
    train(pruned(layer), x)


@pytest.mark.parametrize(
    "given",
    [
        lambda x: x[:0],
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: x[:1].expand(5, -1, -1, -1),
        lambda x: x.to(memory_format=torch.channels_last),
    ],
    ids=["empty batch", "non-contiguous", "expanded", "channels last"],
)
def test_awkward_inputs(given):
    model, x = pruned(network()).eval(), given(images())
    dense = lth.densify_(copy.deepcopy(model))
    y, want = model(x), dense(x)
    y.sum().backward(), want.sum().backward()
    assert torch.equal(y, want)
    assert torch.equal(model[4].weight.grad, dense[4].weight.grad * model[4].weight_mask)


def test_autocast():
    model, x = pruned(network()), images()
    dense = lth.densify_(copy.deepcopy(model))
    for module in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and model[4].weight.grad.dtype == torch.float32
    for i in (0, 4):
        assert torch.equal(model[i].weight.grad, dense[i].weight.grad * model[i].weight_mask)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, x = pruned(network()).eval(), images().requires_grad_()
    want = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), want, strict=True))
    assert_clean(model)


def test_layer_used_twice_and_gradients_accumulated():
    layer = pruned(nn.Linear(4, 4))
    x = images(3, 4)
    with torch.no_grad():
        layer.weight.add_(1)  # the first call cleans, the second must find it clean
    layer(layer(x)).sum().backward()
    once = layer.weight.grad.clone()
    layer(layer(x)).sum().backward()
    assert torch.equal(layer.weight.grad, 2 * once) and once.any()
    layer.zero_grad(set_to_none=False)
    assert torch.equal(layer.weight.grad, torch.zeros(4, 4))
    lth.prune_(layer, 0.5)
    train(layer, x)


def test_gradient_penalty():
    model, x = pruned(network()).eval(), images().requires_grad_()
    dense = lth.densify_(copy.deepcopy(model))
    for module in (model, dense):
        (gradient,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert_clean(model)
    assert torch.equal(model[4].weight.grad, dense[4].weight.grad * model[4].weight_mask) and model[4].weight.grad.any()


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed1d"])
def test_compiles_to_one_graph_and_trains(kind):
    layer, x = build(kind)
    pruned(layer)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), x.detach()
    assert torch.equal(compiled(x), layer(x))
    train(compiled, x)
    assert torch.equal(compiled(x), layer(x))


def test_exports():
    model = pruned(network()).eval()
    exported = torch.export.export(model, (images(),)).module()
    assert torch.equal(exported(images()), model(images()))


def test_masked_classes_are_their_dense_classes():
    for dense, masked in MASKED_CLASSES.items():
        assert issubclass(masked, dense) and masked.dense_class is dense


@pytest.mark.parametrize(
    "change",
    [
        lambda model: lth.prune_(model, 0.5),
        lambda model: lth.pack_(model),
        lambda model: lth.densify_(model),
        lambda model: model.load_state_dict({**model.state_dict(), "0.weight_mask": torch.zeros(3, 4)}),
        lambda model: model.load_state_dict({**model.state_dict(), "0.weight_frozen": torch.zeros(3, 4)}),
        lambda model: freeze_(model, {"0": torch.zeros(3, 4)}),
    ],
)
def test_masks_stay_as_they_are_under_a_captured_graph(monkeypatch, change):
    model = lth.sparsify_(nn.Sequential(nn.Linear(4, 3), nn.Conv2d(1, 1, 1)))
    monkeypatch.setattr(MaskedLinear, "note_capture", lambda layer, tensor: setattr(layer, "captured", True))
    model[0](torch.rand(2, 4))
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"masks or frozen weights of a layer under a captured CUDA graph.*sync_"):
        change(model)
    assert model[0].weight_mask.all() and all(torch.equal(before[key], now) for key, now in model.state_dict().items())
    model.load_state_dict(before)  # the same masks
    change(lth.sync_(model))
    assert not copy.deepcopy(model)[0].captured


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_captured_graph_is_noticed(monkeypatch, packed):
    monkeypatch.setenv("LTH_STRATEGY", "dense" if packed else "masked")
    model = lth.prune_(lth.sparsify_(nn.Sequential(nn.Linear(64, 64)).cuda()), 0.5)
    lth.pack_(model)
    x = torch.rand(2, 64, device="cuda")
    model(x)
    assert not model[0].captured
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(x)
    with pytest.raises(ValueError, match="under a captured CUDA graph"):
        lth.unpack_(model)
    lth.unpack_(lth.sync_(model))
