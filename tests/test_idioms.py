"""Idioms: a masked weight may be written, copied, converted, frozen, averaged and handed to a function."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from masked_models import assert_clean, images, network, pruned, train
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import lth_sparse as lth
from lth_sparse.masks import masked_weights


@torch.no_grad()
def written(layer, how):
    """Dirty every entry of the weight in the way `how` names; return what was written."""
    weight = layer.weight
    if how == "init":
        nn.init.normal_(weight)
    elif how == "no_grad":
        weight.add_(1)
    elif how == "detach":
        weight.detach().mul_(0).sub_(2)
    elif how == "assign":
        layer.weight = nn.Parameter(torch.randn_like(weight))
    elif how == "inference":
        with torch.inference_mode():
            weight.add_(1)
    elif how == "inference parameter":
        with torch.inference_mode():
            layer.weight = nn.Parameter(torch.randn_like(weight))
    elif how == "data":
        weight.data.add_(1)
        lth.sync_(layer)
    elif how == "frozen":
        weight.requires_grad_(False).add_(1)
    elif how == "vector":
        nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in layer.parameters())), layer.parameters())
        lth.sync_(layer)
    return layer.weight.detach().clone()


WRITERS = ("init", "no_grad", "detach", "assign", "inference", "inference parameter", "data", "frozen", "vector")


@pytest.mark.parametrize("copied", [False, True], ids=["", "in a copy"])
@pytest.mark.parametrize("how", WRITERS)
def test_written_weights_are_masked_in_the_next_forward(how, copied):
    layer = pruned(nn.Linear(6, 5))
    layer = pickle.loads(pickle.dumps(layer)) if copied else layer
    x = images(3, 6)
    for _ in range(6):
        full, mask = written(layer, how), layer.weight_mask
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, full * mask, layer.bias)) and full[mask].all()
        if how != "inference parameter":  # torch lets nobody write those
            assert torch.equal(layer.weight.detach(), full * mask)
    if how not in ("frozen", "inference parameter"):
        train(layer, x)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=False)
    average.update_parameters(model)
    return average.module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": saved,
    "average": averaged,
    "deepcopied twice": lambda model: copy.deepcopy(copy.deepcopy(model)),
}
every_copy = pytest.mark.parametrize("how", COPIES)


@every_copy
def test_copies_are_masked_models_of_their_own(how):
    model = train(pruned(network()), images())
    twin = COPIES[how](model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    before = lth.snapshot(model)
    lth.prune_(train(twin.train(), images()), 0.5)
    assert lth.density(twin) == pytest.approx(0.25, abs=0.02) and lth.density(model) == pytest.approx(0.5, abs=0.02)
    assert all(torch.equal(value, before[name]) for name, value in lth.snapshot(model).items())


def test_average_follows_masks_that_change():
    model = lth.sparsify_(network())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        average.update_parameters(train(lth.prune_(model, 0.4), images()))
        average(images())
        assert_clean(average.module)
        assert lth.density(average.module) == lth.density(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_conversions_keep_masks(dtype):
    model = pruned(network())
    masks = [weight.mask.clone() for weight in masked_weights(model)]
    x = images().to(dtype)
    train(model.to(dtype).float().to(dtype), x)
    for weight, mask in zip(masked_weights(model), masks, strict=True):
        assert weight.parameter.dtype == dtype and weight.mask.dtype == torch.bool and torch.equal(weight.mask, mask)


def test_pruning_between_backward_and_step_masks_the_gradient():
    layer = lth.sparsify_(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(images(3, 4)).sum().backward()
    lth.prune_(layer, 0.5)
    optimizer.step()
    assert_clean(layer)


def test_frozen_layers_take_no_gradient():
    model = pruned(network())
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, images())
    assert model[0].weight.grad is None and torch.equal(model[0].weight, before)
    model[0].requires_grad_(True)
    assert not torch.equal(train(model, images())[0].weight, before)


def test_handed_in_tensors_are_masked_and_never_written():
    model, dense = pruned(network()).eval(), network()
    nn.init.ones_(dense[4].weight)
    given = dict(dense.named_parameters())
    before = {name: p.detach().clone() for name, p in given.items()}
    masks = {weight.name + ".weight": weight.mask for weight in masked_weights(model)}
    masked = {name: p * masks.get(name, 1) for name, p in given.items()}
    want = functional_call(lth.densify_(copy.deepcopy(model)), masked, images())
    for tensors in (given, {name: p.detach() for name, p in given.items()}):
        assert torch.equal(functional_call(model, tensors, images()), want)
    assert all(torch.equal(p, before[name]) for name, p in given.items())


@pytest.mark.parametrize("detached", [False, True], ids=["own parameters", "detached"])
def test_per_sample_gradients(detached):
    model = pruned(network()).eval()
    parameters = {name: p.detach() if detached else p for name, p in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, x[None]).square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images())
    model(images()).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name].sum(0), p.grad)
        assert p.dim() == 1 or (got[name][:, p.grad == 0] == 0).all()


def test_ensembles_each_with_its_own_mask():
    models = [pruned(network(), rate).eval() for rate in (0.2, 0.8)]
    parameters, buffers = torch.func.stack_module_state(models)
    both = torch.func.vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))
    torch.testing.assert_close(both(parameters, buffers, images()), torch.stack([m(images()) for m in models]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch's own, in its jvp
def test_second_derivatives_by_the_input():
    model = pruned(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)))
    dense, x = lth.densify_(copy.deepcopy(model)), images(6)
    got, want = (torch.func.hessian(lambda x, m=module: m(x).sum())(x) for module in (model, dense))
    assert torch.equal(got, want) and want.any()
