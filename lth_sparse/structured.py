"""Structured tickets: whole units pruned, and dead ones removed for real, so that any hardware gains.

A unit is an output of a Linear or an output channel of a Conv2d. Both verbs follow plain chains, nn.Sequential of the
modules named here, nested or not: only there is it plain which inputs of which layer read a unit.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import scores as _scores
from .convert import match
from .hooks import replace
from .masks import get_masks, masked_layers, masked_weights, set_masks_, sync_
from .nn import MaskedConv2d, MaskedLayer, MaskedLinear
from .packed import refuse_packed
from .prune import check_rate, lowest

LAYERS = (nn.Linear, MaskedLinear, nn.Conv2d, MaskedConv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Tanhshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink),
    *(nn.Softshrink, nn.Threshold),
)
PASSING = (  # unit by unit, and a constant stays what it is, in evaluation mode
    *(nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d),
)


def prune_units_(
    model: nn.Module,
    rate: float = 0.2,
    score: str | Callable = "magnitude",
    exclude: Iterable[str] = (),
    *,
    generator: torch.Generator | None = None,
    **ingredients,
) -> nn.Module:
    """Prune a fraction of the live units of every masked layer but the last, in place; return the model.

    Exactly `round(rate * live)` units of each layer go, those of lowest mean score over their kept weights (Li et al.
    2017, arXiv:1608.08710, section 3.1: by L1 norm), ties chosen by `generator` (seed 0 unless given), and never the
    last live one. Pruned are the weights that compute the unit and those of the next layer that read it, where that is
    masked. A unit is live if it has kept weights of both kinds when the call begins.

    Args:
        rate: fraction of the live units, in (0, 1).
        score: as for `prune_`, like `ingredients`; the model stays as it is if there is nothing to prune by.
        exclude: layer names or patterns whose units all stay; they may lose inputs.

    Raises:
        ValueError: a model that is no plain chain, a rate out of range, a pattern without a layer, nothing to prune.
    """
    refuse_packed(model, "prune_units_")
    check_rate(rate)
    weights = {weight.name: weight for weight in masked_weights(model)}
    links = _links(model, "prune_units_")
    spared = {name for p in ([exclude] if isinstance(exclude, str) else exclude) for name in match(weights, p)}
    chosen = [link for link in links if link.name in weights and link.name not in spared]
    if not chosen:
        raise ValueError("prune_units_ has nothing to prune: it is left no masked layer that another one reads")
    generator = generator or torch.Generator().manual_seed(0)
    final = {name: weight.parameter.detach() for name, weight in weights.items()}
    masks = get_masks(model)
    context = _scores.Context(final, masks, generator, model=model, **ingredients)
    values = _scores.compute(score, context)
    if values is None:
        return model
    for link in chosen:
        gone = _lowest_units(link, values[link.name], rate, generator)
        masks[link.name][gone] = False
        if link.reader_name in masks:
            masks[link.reader_name][:, _spread(gone, link.inputs)] = False
    set_masks_(model, masks)
    return model


@torch.no_grad()
def remove_units_(model: nn.Module) -> nn.Module:
    """Take dead units out of the layers of a masked model, with all their weights and statistics; return the model.

    In evaluation mode the model computes what it did, up to the order of sums. Gone are units that nothing reads (all
    weights that read them are pruned), and units of which all weights are pruned: these give a constant, bias through
    batch norm and activation, which goes into the bias of the next layer. Where that is a convolution that pads, only 0
    can, as a constant counts for less at the border; other constant units stay. So does the last unit of a layer.

    Layers and masks keep their names and kinds and are smaller, so `density` is a fraction of what is left. Parameters
    are new: make a new optimizer.

    Raises:
        ValueError: a model that is no plain chain, no masked layer, a packed layer or one in a captured CUDA graph.
    """
    refuse_packed(model, "remove_units_")
    masked_weights(model)
    links = _links(model, "remove_units_")
    for layer in masked_layers(model):
        layer.refuse_captured("remove_units_")
    sync_(model)
    for link in reversed(links):  # what only an unread unit reads is unread too
        _remove_(link, _but_one(~_read(link)))
    for link in links:  # what reads only constants is a constant too
        constants = _constants(link)
        gone = _but_one(~_fed(link) & _foldable(link, constants))
        _fold_(link.reader, torch.where(_spread(gone, link.inputs), constants, 0))
        _remove_(link, gone)
    return model


class Link(NamedTuple):
    """A layer, the modules that its units pass through, and the layer that reads them."""

    name: str
    layer: nn.Module
    between: list[nn.Module]
    reader_name: str
    reader: nn.Module

    @property
    def inputs(self) -> int:
        return self.reader.weight.shape[1]

    @property
    def norms(self) -> list[nn.Module]:
        return [module for module in self.between if type(module) in NORMS]


def _links(model, verb) -> list[Link]:
    """The links of a plain chain, in order; ValueError that names the first thing that makes it none."""
    leaves = list(_leaves(model))
    places = [i for i, (_, leaf) in enumerate(leaves) if type(leaf) in LAYERS]
    links = [Link(*leaves[a], [leaf for _, leaf in leaves[a + 1 : b]], *leaves[b]) for a, b in pairwise(places)]
    for obstacle in _obstacles(leaves, links):
        raise ValueError(
            f"{verb} follows nn.Sequential chains of Linear, Conv2d, batch norm, pooling, dropout, activations and "
            f"Flatten: it cannot follow {obstacle}"
        )
    return links


def _leaves(module, name="") -> Iterator[tuple[str, nn.Module]]:
    """The modules that run one after the other, by name; what is no nn.Sequential counts as one."""
    if type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for child, inner in module._modules.items():
        yield from _leaves(inner, f"{name}.{child}" if name else child)


def _obstacles(leaves, links) -> Iterator[str]:
    inner, seen = {id(module) for link in links for module in link.between}, set()
    for name, leaf in leaves:
        what, parameters = repr(name) if name else "the model", {id(parameter) for parameter in leaf.parameters()}
        if reason := _why_not(leaf, id(leaf) in inner):
            yield f"{what}, {reason}"
        if parameters & seen:
            yield f"{what}, which shares a parameter with a layer before it"
        seen |= parameters
    for link in links:
        if not _fits(link):
            yield f"how {link.reader_name!r} reads {link.name!r}"


def _why_not(leaf, inner) -> str:
    """Why a chain with this leaf cannot be followed, or ""; `inner`: it lies between two layers."""
    if type(leaf) in LAYERS:
        if "weight" not in leaf._parameters:
            return "whose weight is recomputed in every forward"
        if getattr(leaf, "groups", 1) > 1:
            return "a convolution in groups"
        return "which has frozen weights" if hasattr(leaf, "weight_frozen") else ""
    if not inner and next(leaf.parameters(), None) is None:
        return ""
    if type(leaf) is nn.Flatten and (leaf.start_dim, leaf.end_dim) != (1, -1):
        return "which does not flatten everything but the batch"
    if type(leaf) is nn.AvgPool2d and (leaf.padding not in (0, (0, 0)) or leaf.divisor_override):
        return "whose average of a constant is another number"
    return "" if type(leaf) in (*NORMS, *ELEMENTWISE, *PASSING) else f"a {type(leaf).__name__}"


def _fits(link) -> bool:
    """Whether input i of the reader and of batch norm is plainly of unit i, or of unit i // positions when flat."""
    units, sizes = len(link.layer.weight), [*(norm.num_features for norm in link.norms), link.inputs]
    if link.layer.weight.dim() == link.reader.weight.dim():
        return all(size == units for size in sizes)
    flat = any(type(module) is nn.Flatten for module in link.between)
    return flat and link.layer.weight.dim() == 4 and all(size % units == 0 for size in sizes)


def _lowest_units(link, score, rate, generator) -> Tensor:
    kept = link.layer.weight_mask.flatten(1)
    mean = torch.where(kept, score.flatten(1).double(), 0).sum(1) / kept.sum(1)
    live = _fed(link) & _read(link)
    count = int(live.sum())
    return lowest(mean, live, min(round(rate * count), max(count - 1, 0)), generator)


def _kept(layer) -> Tensor:
    return layer.weight_mask if isinstance(layer, MaskedLayer) else torch.ones_like(layer.weight, dtype=torch.bool)


def _fed(link) -> Tensor:
    """Which units [units] have a kept weight of their own."""
    return _kept(link.layer).flatten(1).any(1)


def _read(link) -> Tensor:
    """Which units [units] a kept weight of the reader reads."""
    return _kept(link.reader).transpose(0, 1).reshape(len(link.layer.weight), -1).any(1)


def _spread(units: Tensor, size: int) -> Tensor:
    """From one entry for each unit to `size` entries: a unit has several inputs of a Linear once it is flat."""
    return units.repeat_interleave(size // len(units))


def _but_one(gone: Tensor) -> Tensor:
    """`gone` without its first unit if that is all of them: a layer needs one."""
    if gone.all():
        gone[0] = False
    return gone


def _constants(link) -> Tensor:
    """What each input of the reader [inputs] gets, in evaluation mode, from a unit that is its bias alone."""
    bias = link.layer.bias
    value = link.layer.weight.new_zeros(len(link.layer.weight)) if bias is None else bias.clone()
    for module in link.between:
        if type(module) in NORMS:
            value = _normalize(module, _spread(value, module.num_features))
        elif type(module) in ELEMENTWISE:
            value = module(value)
    return _spread(value, link.inputs)


def _normalize(norm, value) -> Tensor:
    if norm.running_mean is None:  # it uses the statistics of the batch, from which a constant does not differ
        return torch.zeros_like(value) if norm.bias is None else norm.bias.clone()
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return F.batch_norm(value[None], *statistics, training=False, eps=norm.eps)[0]


def _foldable(link, constants) -> Tensor:
    """Which units [units], were they constant, the bias of the reader could stand for."""
    pads = isinstance(link.reader, nn.Conv2d) and link.reader.padding not in ((0, 0), "valid")
    exact = constants == 0 if pads else constants.isfinite()
    return exact.view(len(link.layer.weight), -1).all(1)


def _fold_(reader, constants) -> None:
    """Add what constant inputs [inputs] amount to, to the bias."""
    added = reader.weight.reshape(*reader.weight.shape[:2], -1).sum(2) @ constants
    if reader.bias is not None:
        reader.bias += added
    elif added.any():
        reader.bias = nn.Parameter(added, requires_grad=reader.weight.requires_grad)


def _remove_(link, gone) -> None:
    if not gone.any():
        return
    _select_(link.layer, ("weight_mask", "weight", "bias"), ~gone)
    for norm in link.norms:
        left = _spread(~gone, norm.num_features)
        _select_(norm, ("weight", "bias", "running_mean", "running_var"), left)
        norm.num_features = int(left.sum())
    _select_(link.reader, ("weight_mask", "weight"), (slice(None), _spread(~gone, link.inputs)))
    for layer in (link.layer, link.reader):
        out, inputs = (
            ("out_channels", "in_channels") if isinstance(layer, nn.Conv2d) else ("out_features", "in_features")
        )
        setattr(layer, out, layer.weight.shape[0])
        setattr(layer, inputs, layer.weight.shape[1])


def _select_(module, names, index) -> None:
    """Index the tensors of these names that there are; a mask comes before its weight, which takes it on."""
    for name in names:
        old = getattr(module, name, None)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(old.detach()[index], requires_grad=old.requires_grad))
            replace(old)
        elif old is not None:
            setattr(module, name, old[index])
