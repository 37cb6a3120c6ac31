"""Steps of one layer under pytest-benchmark, for its JSON, its histograms and its comparison of runs.

    pytest benchmarks/test_layers.py --benchmark-autosave
    pytest benchmarks/test_layers.py --benchmark-compare --benchmark-json=layers.json

Ratios come from `lth bench`, whose timings are interleaved; these are for watching one machine over time.
"""

import time

import pytest
import torch
from lth_sparse.benchmarks import layers, providers
from lth_sparse.benchmarks.clocks import synchronize
from lth_sparse.benchmarks.shapes import Shape

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = Shape("linear", (1024, 1024), (60, 1024))
PROVIDERS = ("dense, fused Adam", providers.PRUNE, "ours: masked", providers.CHOSEN)


def synchronised() -> float:
    """Seconds, when the device has done all it was given."""
    synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(timer=synchronised, min_rounds=21, max_time=0.5, warmup=True, warmup_iterations=5)
@pytest.mark.parametrize("density", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark, provider, density):
    step, strategy = layers.training_step(SHAPE, provider, density, DEVICE)
    benchmark.extra_info.update(strategy=strategy, precision="fp32", density=density, shape=str(SHAPE))
    benchmark(step)
