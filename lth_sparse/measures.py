"""What is measured of networks beside their accuracy: signs, dead units, the path between two of them, energy."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .actions import check_same_entries, rewind_, snapshot
from .masks import masked_weights


class Point(NamedTuple):
    """A network on the way from `a` (`alpha` 0) to `b` (1); `accuracy` is a fraction."""

    alpha: float
    loss: float
    accuracy: float


def sign_changes(
    start: Mapping[str, Tensor], final: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, float]:
    """The fraction of each layer's kept weights whose sign training changed; 0 for a layer with none.

    Zero has no sign: a weight that starts or ends there has not changed it.

    Args:
        start, final: snapshots, or mappings by the names of `masks`; dense shapes.
        masks: bool, as `masks.get_masks` returns them.

    Raises:
        ValueError: a layer is missing from `start` or `final`, or has another shape there.
    """
    starts, finals = _weights(start, masks), _weights(final, masks)
    found = {}
    for name, mask in masks.items():
        signs = [values[name][mask].sign() for values in (starts, finals)]
        found[name] = int((signs[0] * signs[1] < 0).sum()) / max(1, int(mask.count_nonzero()))
    return found


def dead_units(model: nn.Module) -> dict[str, int]:
    """How many units or output channels of each masked layer have no kept incoming weight, by the name of the weight.

    The rows of query, key and value count as units of an attention's `in_proj_weight`. What is frozen is not kept.

    Raises:
        ValueError: the model has no masked layer.
    """
    return {weight.name: int((~_rows(weight).any(1)).sum()) for weight in masked_weights(model)}


def interpolate(
    model: nn.Module,
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], tuple[float, float]],
    points: int = 11,
) -> list[Point]:
    """Evaluate networks evenly spaced on the straight line between two snapshots, both ends included.

    Floating-point buffers are interpolated as parameters are, the running mean and variance of batch norm too; they
    are not estimated anew. Integers are those of `a`. The masks are the model's, and so apply to `a` and `b` alike.
    The model gets its own values back.

    Args:
        evaluate: given the model, returns its loss and its accuracy (a fraction).

    Raises:
        ValueError: fewer than two points, a snapshot of another model, a packed layer.
    """
    if points < 2:
        raise ValueError(f"points must be 2 or more, got {points}")
    check_same_entries("the snapshot b", b, a)
    own, found = snapshot(model), []
    try:
        for step in range(points):
            alpha = step / (points - 1)
            rewind_(model, {name: _between(a[name], b[name], alpha) for name in a})
            found.append(Point(alpha, *map(float, evaluate(model))))
    finally:
        rewind_(model, own)
    return found


def instability(path: list[Point]) -> float:
    """The error barrier on a path: its highest error less the mean error of its ends, a fraction.

    Frankle, Dziugaite, Roy, Carbin 2020 (arXiv:1912.05671), section 2; below 0.02 they call a network stable.
    """
    errors = [1 - point.accuracy for point in path]
    return max(errors) - (errors[0] + errors[-1]) / 2


class Energy:
    """The energy that torch's current GPU takes inside a `with` block, by its own counter (NVML, Volta or newer).

    `joules` is None where it cannot be read, and then `why` says so in a sentence. The whole GPU is counted, with what
    other processes do there; the counter moves several times a second, so that blocks should last seconds.
    """

    joules: float | None = None
    why: str = ""

    @classmethod
    def available(cls) -> str:
        """Whether it can be measured here, or why not, in words."""
        meter = cls()
        return "measured by NVML" if meter._read() is not None else f"not measured: {meter.why}"

    def __enter__(self) -> "Energy":
        self._begin = self._read()
        return self

    def __exit__(self, *error) -> None:
        if self._begin is not None and (end := self._read()) is not None:
            self.joules = (end - self._begin) / 1000

    def _read(self) -> int | None:
        """Millijoules since the driver was loaded."""
        if not torch.cuda.is_available():
            self.why = "torch sees no CUDA device here"
            return None
        try:
            import pynvml
        except ImportError:
            self.why = "the package nvidia-ml-py, which reads the counter, is not installed"
            return None
        torch.cuda.synchronize()  # queued work belongs to the block that queued it
        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties().uuid  # its index would forget CUDA_VISIBLE_DEVICES
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError as error:
            self.why = f"NVML cannot read the energy counter: {error}"
            return None


def _weights(values, masks) -> dict[str, Tensor]:
    """Of a snapshot, the weights under the names of their masks, on the masks' devices."""
    names = {name: name if name in values else f"{name}.weight" for name in masks}
    given = {name: values[own] for name, own in names.items() if own in values}
    check_same_entries("the snapshot", given, masks)
    return {name: tensor.to(masks[name].device) for name, tensor in given.items()}


def _rows(weight) -> Tensor:
    """The mask with a row for each output: bool [outputs, inputs of each]."""
    layer, mask = weight.owners[0][0], weight.mask
    if getattr(layer, "transposed", False):  # [inputs, outputs of a group, ...]
        mask = mask.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return mask.flatten(1)


def _between(a, b, alpha):
    return torch.lerp(a, b.to(a.device), alpha) if a.is_floating_point() else a
