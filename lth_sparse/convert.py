"""Plain model to masked model and back, and what is masked in it."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from .nn import MASKED_CLASSES, MaskedLayer, MaskedMultiheadAttention, masked_layers, masked_weights


def sparsify_(model: nn.Module, targets: str | Iterable[str] = "all", exclude: Iterable[str] = ()) -> nn.Module:
    """Make layers of `model` masked, in place, with masks that keep everything; its output is unchanged.

    Exact torch types only: Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, MultiheadAttention. Subclasses, lazy and
    parametrized layers, and weights tied to something that is not a target stay as they are; `summary` says why.

    Args:
        targets: "all", or layer names or patterns ("head", "block?.conv*"); a pattern matches whole trailing parts
            of a dotted name.
        exclude: layer names or patterns to leave alone.

    Raises:
        ValueError: a pattern that matches no layer, or nothing to mask.
    """
    candidates = {name: module for name, module in model.named_modules() if not _why_not(module)}
    chosen = set(candidates)
    if targets != "all":
        patterns = [targets] if isinstance(targets, str) else list(targets)
        chosen = {name for pattern in patterns for name in match(candidates, pattern)}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        chosen -= set(match(candidates, pattern))
    chosen = _without_ties(model, chosen)
    if not chosen:
        raise ValueError("nothing to mask: the targets leave no Linear, convolution or attention layer of exact type")
    for name in chosen:
        mask_layer_(candidates[name])
    _share_masks(model)
    return model


def mask_layer_(layer: nn.Module) -> None:
    """Swap the class of one layer for its masked class and add masks that keep everything."""
    if isinstance(layer, MaskedLayer):
        return
    layer.__class__ = MASKED_CLASSES[type(layer)]
    for name in layer.masked_names():
        layer.register_buffer(name + "_mask", torch.ones_like(getattr(layer, name), dtype=torch.bool))
    layer.sync_()
    if isinstance(layer, MaskedMultiheadAttention):
        layer.attach_hooks()


def densify_(model: nn.Module) -> nn.Module:
    """Turn masked layers into plain torch layers again, with zeros in place of pruned weights; return the model.

    The gradient of an attention projection stays masked by the hook on its parameter: deepcopy the model to lose it.
    """
    for layer in masked_layers(model):
        layer.sync_()
        for name in layer.masked_names():
            delattr(layer, name + "_mask")
        layer.__class__ = layer.dense_class
    return model


def density(model: nn.Module) -> float:
    """Kept / all weights of the masked layers, biases excluded: the paper's Pm as a fraction."""
    masks = [weight.mask for weight in masked_weights(model)]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


class LayerSummary(NamedTuple):
    """One parameter: its state is "masked" or "dense"; `note` says why a dense one is not masked."""

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    state: str
    note: str = ""


class Summary(list[LayerSummary]):
    """The rows of `summary`; printing it gives a table."""

    def __str__(self) -> str:
        head = ("layer", "shape", "kept", "of", "density", "state", "note")
        rows = [
            (r.name, "x".join(map(str, r.shape)), f"{r.kept:,}", f"{r.total:,}", f"{r.kept / max(r.total, 1):.2%}")
            + (r.state, r.note)
            for r in self
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def summary(model: nn.Module) -> Summary:
    """Account for every parameter of `model`: shape, kept, state, and why not masked."""
    masks = {
        id(getattr(layer, name)): getattr(layer, name + "_mask")
        for layer in masked_layers(model)
        for name in layer.masked_names()
    }
    rows = Summary()
    for name, parameter in model.named_parameters():
        shape, total = tuple(parameter.shape), parameter.numel()
        if id(parameter) in masks:
            rows.append(LayerSummary(name, shape, int(masks[id(parameter)].sum()), total, "masked"))
        else:
            rows.append(LayerSummary(name, shape, total, total, "dense", _note(model, name)))
    return rows


def match(names: Iterable[str], pattern: str) -> list[str]:
    """The names that `pattern` matches whole or in their trailing dotted parts; ValueError when there is none."""
    names = list(names)
    found = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, "*." + pattern)]
    if not found:
        raise ValueError(
            f"no layer matches {pattern!r}: the model has {', '.join(map(repr, names)) or 'none to match'}"
        )
    return found


def _why_not(module: nn.Module) -> str:
    """Why this module cannot be masked, or "" if it can (or is)."""
    if isinstance(module, MaskedLayer):
        return ""
    kinds = [dense for dense in MASKED_CLASSES if isinstance(module, dense)]
    if not kinds:
        return f"{type(module).__name__} is never pruned"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} is lazy: run the model once first"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if type(module) not in MASKED_CLASSES:
        return f"{type(module).__name__} is a subclass of {kinds[0].__name__} with a forward of its own"
    if not isinstance(module, nn.MultiheadAttention) and "weight" not in module._parameters:
        return "its weight is recomputed in every forward (weight_norm, torch.nn.utils.prune)"
    return ""


def _note(model, parameter_name):
    layer_name, _, name = parameter_name.rpartition(".")
    layer = model.get_submodule(layer_name)
    if "bias" in name:
        return "biases are never pruned"
    users = _users(model)[id(getattr(layer, name))]
    if not _why_not(layer) and len(users) > 1:
        return f"tied with {', '.join(sorted(users - {layer_name}))}, which is not a target"
    return _why_not(layer) or "not a target"


def _users(model) -> dict[int, set[str]]:
    """Parameter id -> names of the modules that hold it."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(name)
    return users


def _without_ties(model, chosen: set[str]) -> list[str]:
    """The chosen layers in model order, less those whose weight an outsider holds too."""
    tied_outside = [names for names in _users(model).values() if len(names) > 1 and not names <= chosen]
    outsiders = set().union(*tied_outside) if tied_outside else set()
    return [name for name, _ in model.named_modules() if name in chosen - outsiders]


def _share_masks(model):
    """Tied weights share one mask buffer."""
    for weight in masked_weights(model):
        for layer, name in weight.owners[1:]:
            layer._buffers[name + "_mask"] = weight.mask
