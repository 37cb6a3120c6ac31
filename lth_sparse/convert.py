"""Plain model to masked model and back, and what is masked in it."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune

from .dispatch import Choice
from .hooks import disown
from .masks import masked_layers, masked_weights
from .nn import MASKED_CLASSES, MaskedLayer, MaskedMultiheadAttention
from .packed import PackedLayer
from .packing import unpack_


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
    candidates = [name for name, module in model.named_modules() if not _why_not(module)]
    chosen = set(candidates)
    if targets != "all":
        patterns = [targets] if isinstance(targets, str) else list(targets)
        chosen = {name for pattern in patterns for name in match(candidates, pattern)}
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        chosen -= set(match(candidates, pattern))
    layers = maskable(model, chosen)
    if not layers:
        raise ValueError("nothing to mask: the targets leave no Linear, convolution or attention layer of exact type")
    for layer in layers:
        mask_layer_(layer)
    _share_masks(model)
    return model


def mask_layer_(layer: nn.Module) -> None:
    """Swap the class of one layer for its masked class and add masks that keep everything."""
    if isinstance(layer, MaskedLayer):
        return
    layer.__class__ = MASKED_CLASSES[type(layer)]
    with torch.inference_mode(False):  # a mask made in inference mode could not serve a backward later
        for name in layer.masked_names():
            layer.register_buffer(name + "_mask", torch.ones_like(getattr(layer, name), dtype=torch.bool))
    layer.sync_()
    if isinstance(layer, MaskedMultiheadAttention):
        layer.attach_hooks()


def from_torch_prune_(model: nn.Module) -> nn.Module:
    """Make layers that `torch.nn.utils.prune` has pruned masked ones with the same masks, in place; return the model.

    Its output is unchanged, and parameters stay the same objects. Back again: `get_masks`, `densify_`, and torch's
    `custom_from_mask` with each mask. Layers that cannot be masked, whose bias is pruned too or whose weight is tied
    stay with torch.

    Raises:
        ValueError: no layer is pruned by torch and can be masked.
    """
    users = _users(model)
    pruned = {name: layer for name, layer in model.named_modules() if _pruned_by_torch(layer, users)}
    readers = {owner for name in pruned if (owner := _attention_of(model, name)) is not None}
    names = {name for name in readers if not _why_not(model.get_submodule(name))} | pruned.keys()
    pruned = {name: layer for name, layer in pruned.items() if _attention_of(model, name) in names | {None}}
    if not pruned:
        raise ValueError("torch.nn.utils.prune has pruned no layer here that can be masked: sparsify_ takes plain ones")
    masks = [(layer, name, layer._buffers[name + "_mask"]) for layer in pruned.values() for name in _torch_names(layer)]
    for layer, name, _ in masks:
        prune.remove(layer, name)
    for layer in maskable(model, names):
        mask_layer_(layer)
    for layer, name, mask in masks:
        getattr(layer, name + "_mask").copy_(mask)
        layer.sync_()
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Turn masked layers into plain torch layers again; pruned weights are zero, or as they are frozen.

    Returns the model, whose output is unchanged.
    """
    for layer in masked_layers(unpack_(model)):
        layer.sync_()
        _write_frozen_(layer)
        for name in layer.masked_names():
            delattr(layer, name + "_mask")
            disown(getattr(layer, name))
        layer.__class__ = layer.dense_class
    return model


@torch.no_grad()
def _write_frozen_(layer):
    if "weight_frozen" in layer._buffers:
        layer.weight.add_(layer.weight_frozen)
        del layer.weight_frozen


def density(model: nn.Module) -> float:
    """Kept / all weights of the masked layers, biases excluded: the paper's Pm as a fraction. Frozen are not kept."""
    masks = [weight.mask for weight in masked_weights(model)]
    return sum(int(mask.count_nonzero()) for mask in masks) / sum(mask.numel() for mask in masks)


class LayerSummary(NamedTuple):
    """One parameter: its state is "packed", "masked" or "dense"; `note` says why it is not the one before.

    `gain` is how many times faster than masked `pack_` measured a step of the layer to be, None where it did not; the
    note then has that of every strategy it tried.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    total: int
    state: str
    strategy: str = ""
    gain: float | None = None
    note: str = ""


class Summary(list[LayerSummary]):
    """The rows of `summary`; printing it gives a table."""

    def __str__(self) -> str:
        head = ("layer", "shape", "kept", "of", "density", "state", "strategy", "gain", "note")
        rows = [
            (r.name, "x".join(map(str, r.shape)), f"{r.kept:,}", f"{r.total:,}", f"{r.kept / max(r.total, 1):.2%}")
            + (r.state, r.strategy, "" if r.gain is None else f"{r.gain:.2f}x", r.note)
            for r in self
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [head, *rows])


def summary(model: nn.Module) -> Summary:
    """Account for every parameter of `model`: shape, kept, state, strategy and its measured gain, or why not masked."""
    owners = {}
    for layer in masked_layers(model):
        names = ["values"] if isinstance(layer, PackedLayer) else layer.masked_names()
        owners |= {id(getattr(layer, name)): layer for name in names}
    rows = Summary()
    for name, parameter in model.named_parameters():
        if id(parameter) in owners:
            rows.append(_masked_row(name, owners[id(parameter)]))
        else:
            shape, total = ((), 0) if is_lazy(parameter) else (tuple(parameter.shape), parameter.numel())
            rows.append(LayerSummary(name, shape, total, total, "dense", note=_note(model, name)))
    return rows


def _masked_row(name, layer):
    layer_name, dot, weight = name.rpartition(".")
    weight = "weight" if isinstance(layer, PackedLayer) else weight
    mask, choice = getattr(layer, weight + "_mask"), getattr(layer, "choice", Choice("masked"))
    state = "packed" if isinstance(layer, PackedLayer) else "masked"
    gains = ", ".join(f"{name} {gain:.2f}x" for name, gain in (choice.gains or {}).items())
    note = ("dense measured faster: " if choice.strategy == "masked" else "measured: ") + gains if gains else ""
    frozen = layer._buffers.get("weight_frozen")
    note = note if frozen is None else f"{int(frozen.count_nonzero()):,} pruned weights are frozen"
    counts = (tuple(mask.shape), int(mask.count_nonzero()), mask.numel())
    return LayerSummary(layer_name + dot + weight, *counts, state, choice.strategy, choice.gain, note)


def maskable(model: nn.Module, names: set[str]) -> list[nn.Module]:
    """The layers among `names` that can be masked, in model order: no weight of theirs is an outsider's too."""
    layers = {n: layer for n, layer in model.named_modules() if n in names and not _why_not(layer)}
    masked = {n for n, layer in model.named_modules() if isinstance(layer, MaskedLayer)}
    insiders, users = masked | set(layers), _users(model)
    return [
        layer
        for name, layer in layers.items()
        if all(users[id(getattr(layer, weight))] <= insiders for weight in weight_names(layer))
        and _attention_of(model, name) in insiders | {None}
    ]


def weight_names(layer: nn.Module) -> list[str]:
    """The parameters that are masked in `layer`, which is of a type that can be."""
    return MASKED_CLASSES.get(type(layer), type(layer)).masked_names(layer)


def match(names: Iterable[str], pattern: str) -> list[str]:
    """The names that `pattern` matches whole or in their trailing dotted parts; ValueError when there is none."""
    names = list(names)
    found = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, "*." + pattern)]
    if not found:
        raise ValueError(
            f"no layer matches {pattern!r}: the model has {', '.join(map(repr, names)) or 'none to match'}"
        )
    return found


def _torch_names(layer):
    """What `torch.nn.utils.prune` prunes in this layer."""
    hooks = layer._forward_pre_hooks.values()
    return [hook._tensor_name for hook in hooks if isinstance(hook, prune.BasePruningMethod)]


def _pruned_by_torch(layer, users):
    """Whether torch prunes weights of this layer, nothing else, and once its hooks are gone it can be masked."""
    pruned = {*_torch_names(layer)}
    if not pruned or type(layer) not in MASKED_CLASSES or parametrize.is_parametrized(layer):
        return False
    weights = {*weight_names(layer)}
    alone = all(len(users[id(layer._parameters[name + "_orig"])]) == 1 for name in pruned)
    return alone and pruned <= weights and weights - pruned <= layer._parameters.keys()


def _why_not(module: nn.Module) -> str:
    """Why this module cannot be masked, or "" if it can (or is)."""
    if isinstance(module, MaskedLayer):
        return ""
    if isinstance(module, parametrize.ParametrizationList):
        return "it is parametrized"
    kinds = [dense for dense in MASKED_CLASSES if isinstance(module, dense)]
    if not kinds:
        return f"{type(module).__name__} is never pruned"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{type(module).__name__} is lazy: run the model once first"
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if type(module) not in MASKED_CLASSES:
        return f"{type(module).__name__} is a subclass of {kinds[0].__name__} with a forward of its own"
    if not all(name in module._parameters for name in weight_names(module)):
        return "its weight is recomputed in every forward (weight_norm, torch.nn.utils.prune)"
    return ""


def _note(model, parameter_name):
    layer_name, _, name = parameter_name.rpartition(".")
    layer = model.get_submodule(layer_name)
    if "bias" in name:
        return "biases are never pruned"
    attention = _attention_of(model, layer_name)
    if attention is not None and not isinstance(model.get_submodule(attention), MaskedLayer):
        return f"read by {attention or 'the model'}, which is not a target"
    users = sorted(_users(model)[id(getattr(layer, name))])
    reasons = [_why_not(model.get_submodule(user)) for user in users]
    tied = ", ".join(user for user in users if user != layer_name)
    return (tied and f"tied with {tied}: ") + next(filter(None, reasons), "not a target")


def _users(model) -> dict[int, set[str]]:
    """Parameter id -> names of the modules that hold it."""
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(name)
    return users


def _attention_of(model, name) -> str | None:
    """The name of the attention that reads this layer's weight past its forward, if `name` is an `out_proj`."""
    owner, _, child = name.rpartition(".")
    return owner if child == "out_proj" and isinstance(model.get_submodule(owner), nn.MultiheadAttention) else None


def _share_masks(model):
    """Tied weights share one mask buffer."""
    for weight in masked_weights(model):
        for layer, name in weight.owners[1:]:
            layer._buffers[name + "_mask"] = weight.mask
