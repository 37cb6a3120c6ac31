"""Which strategy is chosen, and that measurements are kept."""

import json

import pytest
import torch

from lth_sparse import dispatch
from lth_sparse.dispatch import Choice, Signature, choose

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LTH_CACHE", str(tmp_path))
    monkeypatch.delenv("LTH_STRATEGY", raising=False)
    return tmp_path


def signature(density, n=1024, k=1024, dtype=torch.float32):
    return Signature(60, n, k, density, dtype)


def test_without_a_measurement_small_or_dense_layers_stay_masked():
    chosen = [choose(signature(density), CPU, measure=False).strategy for density in (1.0, 0.5, 0.1, 0.01)]
    assert chosen == ["masked", "masked", "cpu", "cpu"]
    assert choose(signature(0.1, 10, 10), CPU, measure=False) == Choice("masked")


def test_what_the_cpu_kernels_cannot_compute_stays_masked(monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", "cpu")
    assert choose(signature(0.01, dtype=torch.bfloat16), CPU, measure=False) == Choice("masked")
    assert choose(signature(0.01), torch.device("meta"), measure=False) == Choice("masked")


def test_a_measurement_decides_and_is_kept(monkeypatch, cache):
    gains = iter([3.0, 0.5])
    monkeypatch.setattr(dispatch, "measured_gain", lambda *_: next(gains))
    assert choose(signature(0.1), CPU, measure=True) == Choice("cpu", 3.0)
    assert choose(signature(0.1), CPU, measure=True) == Choice("cpu", 3.0)
    assert choose(signature(0.02), CPU, measure=True) == Choice("masked", 0.5)
    (path,) = cache.iterdir()
    assert sorted(json.loads(path.read_text()).values()) == [0.5, 3.0]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"linear": "x"}'])
def test_a_damaged_cache_is_measured_again(monkeypatch, cache, content):
    monkeypatch.setattr(dispatch, "measured_gain", lambda *_: 2.0)
    choose(signature(0.1), CPU, measure=True)
    (path,) = cache.iterdir()
    path.write_text(content)
    assert choose(signature(0.1), CPU, measure=True) == Choice("cpu", 2.0)


@pytest.mark.parametrize("strategy", ["cpu", "dense"])
def test_measured_gain_is_a_positive_ratio(strategy):
    assert 0 < dispatch.measured_gain(signature(0.1, 40, 50), strategy, CPU, repeats=3) < 100


def test_the_environment_forces(monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", "masked")
    assert choose(signature(0.01), CPU, measure=False) == Choice("masked")
    monkeypatch.setenv("LTH_STRATEGY", "cpu")
    assert choose(signature(0.9), CPU, measure=False) == Choice("cpu")
    monkeypatch.setenv("LTH_STRATEGY", "fast")
    with pytest.raises(ValueError, match="LTH_STRATEGY must be one of masked, cpu, dense, got 'fast'"):
        choose(signature(0.9), CPU, measure=False)


def test_like_signatures_share_a_measurement():
    assert signature(0.1).key() == signature(0.101).key() == signature(0.1)._replace(rows=64).key()
    assert len({signature(0.1).key(), signature(0.2).key(), signature(0.1, 512).key(), signature(0.0).key()}) == 4
