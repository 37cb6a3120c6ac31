"""The choice of strategy for a layer: a heuristic shortlist, measured, and kept on disk.

Strategies: "masked" computes densely; "cpu" multiplies CSR matrices with MKL; "dense" multiplies
the shadow densely and stores the weight gradient packed. LTH_STRATEGY forces one wherever it can run; LTH_CACHE names
the folder of the measurements (~/.cache/lth_sparse).
"""

import json
import logging
import math
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops

STRATEGIES = ("masked", "cpu", "dense")
# One core, batch 60 (torch 2.15): CSR steps take 0.5x the dense time at density 0.1 on 4096 x 4096, 1.05x on 300 x 784.
# A shadow costs 4 bytes a weight, which the shorter gradient and moments win back below a density of 0.7.
MAX_DENSITY = {"cpu": 0.2, "dense": 0.7}
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


def runnable(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """The strategies that can compute a linear layer there; on the CPU "dense" only through Triton's interpreter."""
    if device.type == "cuda":
        return ("masked", "dense") if dtype in (torch.float32, torch.bfloat16, torch.float16) else ("masked",)
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64):
        return ("masked",)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32
    return ("masked", "cpu", "dense") if interpreted else ("masked", "cpu")


def choose(signature: Signature, device: torch.device, measure: bool) -> Choice:
    """How to compute a linear layer of that signature: measured, or with `measure` false by rule of thumb alone.

    Raises:
        ValueError: LTH_STRATEGY names no strategy.
    """
    forced, able = os.environ.get("LTH_STRATEGY"), runnable(device, signature.dtype)
    if forced is not None and forced not in STRATEGIES:
        raise ValueError(f"LTH_STRATEGY must be one of {', '.join(STRATEGIES)}, got {forced!r}")
    if forced:
        return Choice(forced if forced in able else "masked")
    packed = {"cpu": "cpu", "cuda": "dense"}.get(device.type)
    if packed not in able or signature.density > MAX_DENSITY[packed]:
        return Choice("masked")
    if not measure:
        return Choice(packed if packed == "cpu" and _is_sparse_enough(signature) else "masked")
    gain = _remembered(signature, packed, device)
    _log.info("%s: %s is %.2fx masked", signature.key(), packed, gain)
    return Choice(packed if gain >= MARGIN else "masked", gain)


def measured_gain(signature: Signature, strategy: str, device: torch.device, repeats: int = 7) -> float:
    """Median over interleaved pairs of the time of a masked step over that of a packed one, on random data.

    A step is forward, all three gradients, fused Adam, and the refresh of the shadow where there is one.
    """
    steps = [_step(signature, name, device) for name in ("masked", strategy)]
    times = [[_seconds(step, device) for step in steps] for _ in range(repeats + 2)][2:]
    return statistics.median(masked / packed for masked, packed in times)


def _is_sparse_enough(signature):
    large = signature.n * signature.k >= 2**18
    return signature.density <= (0.12 if large else 0.06)


def _step(signature, strategy, device):
    rows, n, k, density, dtype = signature
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(n, k, generator=generator).to(device) < density
    x = torch.randn(rows, k, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(rows, n, generator=generator).to(device, dtype)
    dense = torch.randn(n, k, generator=generator).to(device, dtype) * mask
    weight = (dense.clone() if strategy == "masked" else dense[mask]).requires_grad_()
    bias = torch.zeros(n, device=device, dtype=dtype, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], fused=True)
    pattern = ops.csr(mask) if strategy == "cpu" else ops.bitmap(mask[None])
    forward = {
        "masked": lambda: F.linear(x, ops.mask_gradient(weight, mask), bias),
        "cpu": lambda: ops.csr_linear(x, weight, bias, *pattern),
        "dense": lambda: ops.shadow_linear(x, weight, dense, bias, *pattern),
    }[strategy]

    def step():
        output = forward()
        optimizer.zero_grad()
        output.backward(dy)
        optimizer.step()
        if strategy == "dense":
            ops.refresh_(dense, weight.detach(), *pattern)

    return step


def _seconds(step, device):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begin


def _remembered(signature, strategy, device) -> float:
    """The measured gain, from the file of this machine or measured now."""
    folder = Path(os.environ.get("LTH_CACHE") or Path.home() / ".cache" / "lth_sparse")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    machine = re.sub(r"[^\w.]+", "-", f"{chip} {platform.machine()} torch {torch.__version__}")
    path = folder / f"{machine}.json"
    known, key = _read(path), f"{strategy} {signature.key()}"
    if key not in known:
        known[key] = measured_gain(signature, strategy, device)
        _write(path, known)
    return known[key]


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
