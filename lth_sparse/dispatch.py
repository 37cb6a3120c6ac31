"""The choice of strategy for a layer: a heuristic shortlist, measured, and kept on disk.

Strategies: "masked" computes densely, at the speed of dense; "cpu" multiplies CSR matrices with MKL. LTH_STRATEGY
forces one wherever it can run; LTH_CACHE names the folder of the measurements (~/.cache/lth_sparse).
"""

import json
import logging
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops

STRATEGIES = ("masked", "cpu")
# One core, batch 60 (torch 2.15): CSR steps take 0.5x the dense time at density 0.1 on 4096 x 4096, 1.05x on 300 x 784.
CPU_DENSITY = 0.2
CPU_ROWS_UNSEEN = 64  # the batch assumed when no sample shows it
MARGIN = 1.05  # a measured gain below this is noise, and masked is the safer state
_log = logging.getLogger("lth_sparse")


class Choice(NamedTuple):
    """A strategy, and how many times faster than masked its whole step was measured (None: not measured)."""

    strategy: str
    gain: float | None = None


class Signature(NamedTuple):
    """What a linear layer's speed depends on: rows of its input, W [N, K], density, dtype."""

    rows: int
    n: int
    k: int
    density: float
    dtype: torch.dtype

    def key(self) -> str:
        """The same for layers that should behave alike: rows to a power of 2, density to a quarter of an octave."""
        rows = 2 ** round(math.log2(max(self.rows, 1)))
        octave = round(4 * math.log2(self.density)) / 4 if self.density > 0 else -math.inf
        return f"linear {rows} {self.n}x{self.k} 2^{octave:.2f} {str(self.dtype)[6:]}"


def choose(signature: Signature, device: torch.device, measure: bool) -> Choice:
    """How to compute a linear layer of that signature: measured, or with `measure` false by heuristic alone.

    Raises:
        ValueError: LTH_STRATEGY names no strategy.
    """
    forced = os.environ.get("LTH_STRATEGY")
    if forced is not None and forced not in STRATEGIES:
        raise ValueError(f"LTH_STRATEGY must be one of {', '.join(STRATEGIES)}, got {forced!r}")
    if device.type != "cpu" or signature.dtype not in (torch.float32, torch.float64):
        return Choice("masked")
    if forced:
        return Choice(forced)
    if signature.density > CPU_DENSITY:
        return Choice("masked")
    if not measure:
        large = signature.n * signature.k >= 2**18
        return Choice("cpu" if signature.density <= (0.12 if large else 0.06) else "masked")
    gain = _remembered(signature)
    _log.info("%s: cpu is %.2fx masked", signature.key(), gain)
    return Choice("cpu" if gain >= MARGIN else "masked", gain)


def measured_gain(signature: Signature, repeats: int = 7) -> float:
    """Median over interleaved pairs of the time of a masked step over that of a CSR step, on random data.

    A step is forward, all three gradients, and fused Adam.
    """
    steps = [_step(signature, strategy) for strategy in STRATEGIES]
    times = [[_seconds(step) for step in steps] for _ in range(repeats + 2)][2:]
    return statistics.median(masked / packed for masked, packed in times)


def _step(signature, strategy):
    rows, n, k, density, dtype = signature
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, k, generator=generator) < density
    x = torch.randn(rows, k, generator=generator, dtype=dtype).requires_grad_()
    dy = torch.randn(rows, n, generator=generator, dtype=dtype)
    dense = torch.randn(n, k, generator=generator, dtype=dtype) * mask
    weight = (dense if strategy == "masked" else dense[mask]).requires_grad_()
    bias = torch.zeros(n, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], fused=True)
    pattern = ops.csr(mask)

    def step():
        if strategy == "masked":
            y = F.linear(x, ops.mask_gradient(weight, mask), bias)
        else:
            y = ops.csr_linear(x, weight, bias, *pattern)
        optimizer.zero_grad()
        y.backward(dy)
        optimizer.step()

    return step


def _seconds(step):
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def _remembered(signature) -> float:
    """The measured gain, from the file of this machine or measured now."""
    folder = Path(os.environ.get("LTH_CACHE") or Path.home() / ".cache" / "lth_sparse")
    machine = f"{platform.processor() or platform.machine()}-{torch.get_num_threads()}-{torch.__version__}"
    path = folder / f"cpu-{machine.replace('/', '_')}.json"
    known = _read(path)
    if signature.key() not in known:
        known[signature.key()] = measured_gain(signature)
        _write(path, known)
    return known[signature.key()]


def _read(path) -> dict[str, float]:
    try:
        known = json.loads(path.read_text())
        return {key: gain for key, gain in known.items() if isinstance(gain, float)}
    except (OSError, ValueError, AttributeError):  # absent or damaged: measured again
        return {}


def _write(path, known):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(known, indent=1))
        os.replace(part, path)
    except OSError as error:  # a read-only home costs a measurement, not a run
        _log.warning("%s could not be written: %s", path, error)
