"""Two processes that train one model under DistributedDataParallel, over gloo on this machine."""

import sys
from pathlib import Path

import pytest
import torch
from lth_sparse.benchmarks import wire
from two_processes import DENSITIES, OPTIMIZERS, WIDTH, images, outputs, process, pruned, train

import lth_sparse as lth


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) > 6
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_packed_processes_stay_equal_and_train_as_one(found, optimizer):
    model = pruned()
    for ours, theirs in zip(found[0][optimizer], found[1][optimizer], strict=True):
        assert_same(ours, theirs)
        train(model, optimizer, torch.cat([images(0), images(1)], 1))
        for name, tensor in outputs(model).items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: name + m)
        lth.prune_(model, 0.5)


def test_processes_get_the_first_ones_masks_values_and_packed_layers(found):
    first, second = (each["agree"] for each in found)
    assert not torch.equal(first["before"]["0.weight_mask"], second["before"]["0.weight_mask"])
    assert_same(first["before"], first["after"])
    assert_same(first["after"], second["after"])
    assert_same(first["trained"], second["trained"])
    assert not torch.equal(first["trained"]["0.weight"], first["after"]["0.weight"])
    packed = [("packed", "dense"), ("packed", "cpu"), ("masked", "fused")]
    assert [state for state in first["states"] if state[0] != "dense"] == packed
    assert first["states"] == second["states"]


def test_a_plain_model_becomes_the_masked_one_of_the_first_process(found):
    (first, _), (second, kind) = (each["agree masked"] for each in found)
    assert_same(first, second)
    assert kind == "MaskedConv2d" and not first["0.weight_mask"].all()


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted by Linux")
def test_bytes_fall_with_density(found):
    first, second = ({case: wire.Traffic(*n) for case, n in each["traffic"].items()} for each in found)
    sizes, biases = (wire.INPUTS * WIDTH, WIDTH * WIDTH), 2 * WIDTH
    masked = first["masked", 0.1]
    assert (masked.gradients, masked.buffers) == (4 * (sum(sizes) + biases), sum(sizes))
    assert masked.received > 2 * masked.gradients + masked.buffers
    for density in DENSITIES:
        packed = first["packed", density]
        assert packed == second["packed", density]
        assert packed.buffers == 0
        assert packed.gradients == 4 * (sum(round(density * size) for size in sizes) + biases)
        assert 2 * packed.gradients < packed.received < 2 * packed.gradients + 3000  # of what gloo itself says
        assert packed.gradients < packed.construction < packed.gradients + 3000
