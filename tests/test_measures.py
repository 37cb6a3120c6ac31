"""Signs, dead units, paths and energy, on networks small enough to count by eye."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse import measures
from lth_sparse.masks import get_masks, masked_weights, set_masks_


def kept(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def masked(model, **masks):
    set_masks_(lth.sparsify_(model), {**get_masks(model), **masks})
    return model


def test_signs_that_changed_among_kept_weights():
    start = {"a.weight": torch.tensor([[1.0, -1.0, 0.0, 2.0], [1.0, 1.0, -3.0, 1.0]]), "a.bias": torch.zeros(2)}
    final = {"a.weight": torch.tensor([[-1.0, -2.0, 5.0, 0.0], [-1.0, 1.0, 3.0, 1.0]]), "a.bias": torch.ones(2)}
    masks = {"a": kept([1, 1, 1, 1], [0, 1, 1, 1])}
    assert measures.sign_changes(start, final, masks) == {"a": 2 / 7}  # a zero changes nothing, nor does a pruned one
    assert measures.sign_changes(start, final, {"a": kept([0] * 4, [0] * 4)}) == {"a": 0.0}
    tiny = {"a": torch.tensor([1e-30])}  # whose square is zero in float32
    assert measures.sign_changes(tiny, {"a": -tiny["a"]}, {"a": kept(1)}) == {"a": 1.0}


def test_signs_by_the_names_of_a_model():
    model = masked(nn.ModuleDict({"linear": nn.Linear(3, 2), "attention": nn.MultiheadAttention(2, 1)}))
    start = lth.snapshot(model)
    with torch.no_grad():
        model["linear"].weight[0, 0] *= -1
        model["attention"].in_proj_weight *= -1
    found = measures.sign_changes(start, lth.snapshot(model), get_masks(model))
    assert found == {"linear": 1 / 6, "attention.in_proj_weight": 1.0, "attention.out_proj": 0.0}


@pytest.mark.parametrize("other", [{}, {"a.weight": torch.ones(2, 2)}])
def test_signs_of_another_model_are_refused(other):
    good, masks = {"a.weight": torch.ones(1, 2)}, {"a": kept([1, 1])}
    for start, final in ((good, other), (other, good)):
        with pytest.raises(ValueError, match="of another model: 'a'"):
            measures.sign_changes(start, final, masks)


def test_dead_units():
    transposed = nn.ConvTranspose1d(4, 2, 1, groups=2)  # [4 inputs, 1 output of a group, 1]: group 1 has inputs 2, 3
    model = masked(
        nn.ModuleDict({"linear": nn.Linear(2, 3), "conv": nn.Conv2d(2, 2, 1), "back": transposed}),
        linear=kept([1, 0], [0, 0], [0, 0]),
        conv=kept([[[0]], [[0]]], [[[0]], [[1]]]),
        back=kept([[1]], [[0]], [[0]], [[0]]),
    )
    assert measures.dead_units(model) == {"linear": 2, "conv": 1, "back": 1}
    with pytest.raises(ValueError, match="no masked layers"):
        measures.dead_units(nn.Linear(2, 2))


def network(value):
    model = masked(nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1)), **{"0": kept([1, 0])})
    model[0].weight.data.fill_(value)
    model[1].running_mean.fill_(10 * value)
    model[1].num_batches_tracked.fill_(int(value))
    return lth.sync_(model)


def values(model):
    weight, other = model[0].weight[0].tolist()
    return weight, other, model[1].running_mean.item(), model[1].num_batches_tracked.item()


def test_the_path_between_two_networks():
    model, a, b, seen = network(7.0), lth.snapshot(network(1.0)), lth.snapshot(network(3.0)), []

    def evaluate(model):
        seen.append(values(model))
        return 0.5 * len(seen), torch.tensor(0.25 * len(seen))

    found = measures.interpolate(model, a, b, evaluate, points=3)
    assert seen == [(1.0, 0.0, 10.0, 1), (2.0, 0.0, 20.0, 1), (3.0, 0.0, 30.0, 1)]
    assert found == [(0.0, 0.5, 0.25), (0.5, 1.0, 0.5), (1.0, 1.5, 0.75)]
    assert values(model) == (7.0, 0.0, 70.0, 7)
    assert len(measures.interpolate(model, a, b, evaluate)) == 11


def test_a_path_that_breaks_off_leaves_the_model_as_it_was():
    model, end = network(7.0), lth.snapshot(network(1.0))
    with pytest.raises(ZeroDivisionError):
        measures.interpolate(model, end, end, lambda model: 1 / 0)
    with pytest.raises(ValueError, match="snapshot b is of another model: '1.bias'"):
        measures.interpolate(model, end, {k: v for k, v in end.items() if k != "1.bias"}, evaluate=None)
    with pytest.raises(ValueError, match="points must be 2 or more, got 1"):
        measures.interpolate(model, end, end, None, points=1)
    assert values(model) == (7.0, 0.0, 70.0, 7)


@pytest.mark.parametrize(
    "accuracies, barrier", [([0.9, 0.5, 0.7], 0.3), ([0.9, 0.8, 0.7], 0.1), ([0.9, 0.95, 0.9], 0.0)]
)
def test_instability_is_the_highest_error_above_the_mean_of_the_ends(accuracies, barrier):
    path = [measures.Point(i / 2, 1.0, accuracy) for i, accuracy in enumerate(accuracies)]
    assert measures.instability(path) == pytest.approx(barrier)


class Failure(Exception):
    pass


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose counter goes on by 2,500 mJ at every reading."""
    readings = iter(range(10_000, 100_000, 2_500))
    nvml = SimpleNamespace(
        NVMLError=Failure,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID={"GPU-0a": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: {"handle": next(readings)}[handle],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="0a"))
    return nvml


def test_energy_of_a_block(gpu):
    with measures.Energy() as energy:
        assert energy.joules is None
    assert (energy.joules, energy.why) == (2.5, "")


def measured():
    with measures.Energy() as energy:
        pass
    assert energy.joules is None
    return energy.why


def test_energy_that_cannot_be_read(gpu, monkeypatch):
    def refuse(handle):
        raise Failure("Not Supported")

    monkeypatch.setattr(gpu, "nvmlDeviceGetTotalEnergyConsumption", refuse)
    assert measured() == "NVML cannot read the energy counter: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert measured() == "the package nvidia-ml-py, which reads the counter, is not installed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert measured() == "torch sees no CUDA device here"


def test_rows_of_a_mask_stand_for_outputs():
    """A unit is dead exactly if its output does not depend on the input, whatever the kind of layer."""
    for layer, shape in ((nn.Linear(4, 3), (2, 4)), (nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 4, 3, 3))):
        model = masked(nn.Sequential(layer))
        mask = torch.rand(model[0].weight.shape, generator=torch.Generator().manual_seed(0)) < 0.2
        set_masks_(model, {"0": mask})
        output = model(torch.rand(shape)) - model(torch.rand(shape))
        dead = int((output.abs().transpose(0, 1).flatten(1).sum(1) == 0).sum())
        assert measures.dead_units(model) == {masked_weights(model)[0].name: dead} and dead > 0
