"""Which strategy is chosen, and that measurements are kept."""

import json

import pytest
import torch
from kernel_oracle import DEVICE

from lth_sparse import dispatch
from lth_sparse.dispatch import Choice, Layer, choose

CPU = torch.device("cpu")
CONV = (8, 3, 3, 1, 1, 1, 1, 1, 1, 1)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LTH_CACHE", str(tmp_path))
    monkeypatch.delenv("LTH_STRATEGY", raising=False)
    return tmp_path


def masks(density, *shape, device="cpu"):
    mask = torch.zeros(shape, dtype=torch.bool)
    kept = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(0))[: round(density * mask.numel())]
    mask.view(-1)[kept] = True
    return mask.to(device)


def linear(density, n=1024, k=1024, dtype=torch.float32, rows=60):
    return Layer("linear", masks(density, 1, n, k), (n,), dtype, (rows, k))


def conv(density, dtype=torch.float32):
    return Layer("conv2d", masks(density, 1, 8, 3, 3, 16), CONV, dtype, (5, 16, 6, 7))


def test_without_a_measurement_small_or_dense_layers_stay_masked():
    chosen = [choose(linear(density), measure=False).strategy for density in (1.0, 0.5, 0.1, 0.01)]
    assert chosen == ["masked", "masked", "cpu", "cpu"]
    assert choose(linear(0.1, 10, 10), measure=False) == Choice("masked")
    assert choose(conv(0.01), measure=False) == choose(conv(0.01), measure=True) == Choice("masked")


def test_what_the_cpu_kernels_cannot_compute_stays_masked(monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", "cpu")
    assert choose(linear(0.01, dtype=torch.bfloat16), measure=False) == Choice("masked")
    assert choose(conv(0.01), measure=False) == Choice("masked")
    assert dispatch.runnable(torch.device("meta"), torch.float32) == ("masked",)


def test_a_measurement_decides_and_is_kept(monkeypatch, cache):
    gains = iter([{"cpu": 3.0}, {"cpu": 0.5}])
    monkeypatch.setattr(dispatch, "measured_gains", lambda *_: next(gains))
    for _ in range(2):
        assert choose(linear(0.1), measure=True) == Choice("cpu", 3.0, {"cpu": 3.0})
    assert choose(linear(0.02), measure=True) == Choice("masked", 0.5, {"cpu": 0.5})
    (path,) = cache.iterdir()
    assert sorted(json.loads(path.read_text()).values(), key=str) == [{"cpu": 0.5}, {"cpu": 3.0}]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"linear": "x"}', '{"linear": {"cpu": "fast"}}'])
def test_a_damaged_cache_is_measured_again(monkeypatch, cache, content):
    monkeypatch.setattr(dispatch, "measured_gains", lambda *_: {"cpu": 2.0})
    choose(linear(0.1), measure=True)
    (path,) = cache.iterdir()
    path.write_text(content)
    assert choose(linear(0.1), measure=True).strategy == "cpu"


@pytest.mark.parametrize("make, names", [(linear, dispatch.NAMES[1:]), (conv, ("dense", "csr"))])
def test_measured_gains_are_positive_ratios(make, names):
    layer = linear(0.1, 40, 50) if make is linear else conv(0.1)
    layer = layer._replace(masks=layer.masks.to(DEVICE))
    names = [name for name in names if name != "cpu" or DEVICE == "cpu"]
    gains = dispatch.measured_gains(layer, names, repeats=3)
    assert list(gains) == names and all(0 < gain < 100 for gain in gains.values())


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", "masked")
    assert choose(linear(0.01), measure=False) == Choice("masked")
    monkeypatch.setenv("LTH_STRATEGY", "cpu")
    assert choose(linear(0.9), measure=False) == Choice("cpu")
    monkeypatch.setenv("LTH_STRATEGY", "shrink")
    layer = conv(0.9)._replace(masks=conv(0.9).masks.to(DEVICE))
    assert choose(layer, measure=False) == Choice("shrink")
    assert choose(layer._replace(sizes=(*CONV[:-1], 2)), measure=False) == Choice("masked")
    monkeypatch.setenv("LTH_STRATEGY", "fast")
    with pytest.raises(ValueError, match="LTH_STRATEGY must be one of masked, fused, cpu, .*csr.*, got 'fast'"):
        choose(linear(0.9), measure=False)


def test_the_shortlist_on_cuda_follows_size_and_density(monkeypatch):
    def on_cuda(layer):
        return dispatch.shortlist(layer._replace(masks=layer.masks.to("meta")))

    alive = {0.01: 0.5}
    monkeypatch.setattr(Layer, "density", property(lambda layer: layer.sizes[-1] / 1000))
    monkeypatch.setattr(Layer, "alive", property(lambda layer: alive.get(layer.density, 1.0)))
    for promille, names in (
        *((1000, []), (900, []), (650, ["dense"]), (500, ["bitmap", "dense"]), (100, ["csr", "bitmap", "dense"])),
        (10, ["shrink", "csr", "bitmap", "dense"]),
    ):
        assert on_cuda(linear(1, 1024, 1024)._replace(sizes=(promille,))) == names
    assert on_cuda(linear(1, 1024, 1024, rows=4096)._replace(sizes=(100,))) == ["csr", "dense"]
    assert on_cuda(linear(1, 1024, 1024, torch.bfloat16)._replace(sizes=(100,))) == ["bitmap", "dense", "fused"]


def test_like_layers_share_a_measurement():
    base = linear(0.1)
    assert base.key() == linear(0.101).key() == linear(0.1, rows=64).key()
    others = [linear(0.2), linear(0.1, 512), linear(0.0), linear(0.1, dtype=torch.float64), conv(0.1)]
    assert len({layer.key() for layer in (base, *others)}) == 6
