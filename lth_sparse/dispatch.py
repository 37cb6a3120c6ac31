"""The choice of strategy for a layer: a heuristic shortlist, measured, and kept on disk.

"masked" computes densely, and so does "fused", whose weight gradient is masked as our kernel stores it; the strategies
of `ops` compute packed. LTH_STRATEGY forces one wherever it can run; LTH_CACHE names the folder of the measurements
(~/.cache/lth_sparse).
"""

import json
import logging
import math
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops

MASKED = ("masked", "fused")  # strategies of the masked state
NAMES = (*MASKED, *dict.fromkeys(name for kind in ops.STRATEGIES.values() for name in kind))
MARGIN = 1.05  # a measured gain below this is noise, and masked is the safer state
_log = logging.getLogger("lth_sparse")


class Choice(NamedTuple):
    """A strategy, how many times faster than masked its whole step was measured, and that of all that were measured."""

    strategy: str
    gain: float | None = None
    gains: dict[str, float] | None = None


class Layer(NamedTuple):
    """What a layer's speed depends on: see `ops.packed` for kind, masks and sizes.

    `shape` is that of its input, which gets a gradient if `differentiated`.
    """

    kind: str
    masks: Tensor
    sizes: tuple[int, ...]
    dtype: torch.dtype
    shape: tuple[int, ...] | None = None
    differentiated: bool = True

    @property
    def density(self) -> float:
        return int(self.masks.count_nonzero()) / max(self.masks.numel(), 1)

    @property
    def alive(self) -> float:
        """The share of weights in rows and columns, or channels, that keep anything."""
        live = ops.STRATEGIES[self.kind]["shrink"].live(self.masks)
        return live.numel() / max(self.masks.numel(), 1)

    def key(self) -> str:
        """The same for layers that should behave alike: batch to a power of 2, density to a quarter of an octave."""
        batch = 2 ** round(math.log2(max(self.shape[0], 1)))
        density = self.density
        octave = round(4 * math.log2(density)) / 4 if density > 0 else -math.inf
        sizes = "x".join(map(str, (batch, *self.shape[1:]))) + " " + "x".join(map(str, self.sizes))
        first = "" if self.differentiated else " first"
        return f"{self.kind} {sizes} 2^{octave:.2f} alive {self.alive:.1f} {str(self.dtype)[6:]}{first}"


def runnable(device: torch.device, dtype: torch.dtype, kind: str = "linear") -> tuple[str, ...]:
    """The strategies that can compute there; on the CPU all but "cpu" run only through Triton's interpreter."""
    interpreted = device.type == "cpu" and dtype == torch.float32 and os.environ.get("TRITON_INTERPRET") == "1"
    kernels = device.type == "cuda" and dtype in (torch.float32, torch.bfloat16, torch.float16) or interpreted
    mkl = device.type == "cpu" and dtype in (torch.float32, torch.float64)
    fused = ("fused",) if kernels and kind == "linear" else ()
    return ("masked", *fused, *(name for name in ops.STRATEGIES[kind] if (mkl if name == "cpu" else kernels)))


def choose(layer: Layer, measure: bool, forced: str = "auto") -> Choice:
    """How to compute a layer: measured at its shape, or with `measure` false by rule of thumb alone.

    `forced`, else LTH_STRATEGY, is a strategy to use wherever it can run; masked is what is left elsewhere.

    Raises:
        ValueError: `forced` or LTH_STRATEGY names no strategy.
    """
    device = layer.masks.device
    forced = os.environ.get("LTH_STRATEGY", "auto") if forced == "auto" else forced
    if forced not in ("auto", *NAMES):
        raise ValueError(f"LTH_STRATEGY must be one of {', '.join(NAMES)}, got {forced!r}")
    able = [name for name in runnable(device, layer.dtype, layer.kind) if name != "shrink" or _shrinks(layer)]
    if forced != "auto":
        return Choice(forced if forced in able else "masked")
    if not measure:
        return Choice("cpu" if device.type == "cpu" and "cpu" in able and _surely_pays(layer) else "masked")
    names = [name for name in shortlist(layer) if name in able]
    if not names:
        return Choice("masked")
    gains = _remembered(layer, names)
    _log.info("%s: times faster than masked: %s", layer.key(), gains)
    best = max(gains, key=gains.get)
    return Choice(best if gains[best] >= MARGIN else "masked", gains[best], gains)


def shortlist(layer: Layer) -> list[str]:
    """The strategies worth measuring for a layer, by rules of thumb; the likely best first.

    On CUDA the limits are modelled, not measured: a shadow costs 4 bytes a weight, which the shorter gradient and
    moments win back below a density of 0.7; expansion in registers pays while the step is bound by bytes; products
    one by one run at a fifth of the rate of float32 matrices and a fortieth of that of bfloat16; a gradient masked as
    it is stored saves 9 bytes a weight, but our float32 products without tensor cores are slower than cuBLAS's.
    """
    density, (batch, *_), linear = layer.density, layer.shape, layer.kind == "linear"
    if layer.masks.device.type == "cpu":
        # CSR steps take 0.5x the dense time at density 0.1 on 4096 x 4096, 1.05x on 300 x 784 (batch 60, one core)
        return ["cpu"] if density <= 0.2 else []
    exact = layer.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    few_products = density <= (0.2 if exact else 0.05)
    bound_by_bytes = linear and batch <= 128 and layer.masks.numel() >= 2**20
    rules = {
        "shrink": _shrinks(layer) and layer.alive < 0.9,
        "csr": few_products,
        "bitmap": density <= 0.6 and (bound_by_bytes or not linear),
        "dense": density <= 0.7,
        "fused": linear and density < 1 and not exact,
    }
    return [name for name, holds in rules.items() if holds]


def measured_gains(layer: Layer, names: list[str], repeats: int = 7) -> dict[str, float]:
    """Median over interleaved rounds of the time of a masked step over that of each packed one, on random data.

    A step is forward, all gradients, fused Adam, and the refresh of the shadow where there is one.
    """
    steps = [_step(layer, name) for name in ("masked", *names)]
    times = [[_seconds(step, layer.masks.device) for step in steps] for _ in range(repeats + 2)][2:]
    return {name: median(row[0] / row[i + 1] for row in times) for i, name in enumerate(names)}


def _shrinks(layer):
    return layer.kind == "linear" or layer.sizes[-1] == 1  # one group


def _surely_pays(layer):
    return layer.density <= (0.12 if layer.masks.numel() >= 2**18 else 0.06)


def _step(layer, name) -> Callable[[], None]:
    kind, masks, sizes, dtype, shape, differentiated = layer
    generator, device = torch.Generator().manual_seed(0), masks.device
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(differentiated)
    weights = torch.randn(masks.shape, generator=generator).to(device, dtype) * masks
    bias = torch.zeros(sizes[0], device=device, dtype=dtype, requires_grad=True)
    if name in MASKED:
        parameter, forward = _masked_forward(kind, masks, sizes, weights, name == "fused")
        shadow = None
    else:
        how = ops.STRATEGIES[kind][name]
        parameter, pattern, live = weights[masks].requires_grad_(), how.structures(masks, sizes), how.live(masks)
        shadow = None if live is None else weights.new_zeros(live.shape).masked_scatter(live, parameter.detach())

        def forward(x, values, bias):
            return ops.packed(x, values, bias, shadow, pattern, sizes, kind, name)

    optimizer = torch.optim.Adam([parameter, bias], fused=True)
    with torch.no_grad():
        dy = torch.randn(forward(x, parameter, bias).shape, generator=generator).to(device, dtype)

    def step():
        output = forward(x, parameter, bias)
        optimizer.zero_grad()
        output.backward(dy)
        optimizer.step()
        if shadow is not None:
            ops.refresh_(shadow, parameter.detach(), pattern)

    return step


def _masked_forward(kind, masks, sizes, weights, fused):
    if kind == "linear":
        mask = masks[0]
        return weights[0].requires_grad_(), lambda x, weight, bias: ops.masked_linear(x, weight, mask, bias, fused)
    mask, weight = (rows[0].permute(0, 3, 1, 2).contiguous() for rows in (masks, weights))
    options = ops.conv_options(sizes)
    return weight.requires_grad_(), lambda x, w, b: F.conv2d(x, ops.mask_gradient(w, mask), b, **options)


def _seconds(step, device):
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begin


def _remembered(layer, names) -> dict[str, float]:
    """The measured gains, from the file of this machine or measured now."""
    device = layer.masks.device
    folder = Path(os.environ.get("LTH_CACHE") or Path.home() / ".cache" / "lth_sparse")
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {torch.get_num_threads()}"
    precision = torch.get_float32_matmul_precision()
    machine = re.sub(r"[^\w.]+", "-", f"{chip} {platform.machine()} torch {torch.__version__} {precision}")
    path = folder / f"{machine}.json"
    known, key = _read(path), f"{' '.join(names)}: {layer.key()}"
    if key not in known:
        known[key] = measured_gains(layer, names)
        _write(path, known)
    return known[key]


def _read(path) -> dict[str, dict[str, float]]:
    try:
        known = json.loads(path.read_text())
        return {key: gains for key, gains in known.items() if all(isinstance(gain, float) for gain in gains.values())}
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
