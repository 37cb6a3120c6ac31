"""The masks of a whole model: each masked weight once, however many layers share it."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .nn import MaskedLayer
from .packed import refuse_packed


class MaskedWeight(NamedTuple):
    """A masked parameter and the layers that own it (several when it is tied), as `(layer, parameter name)`."""

    name: str
    owners: list[tuple[nn.Module, str]]

    @property
    def parameter(self) -> nn.Parameter:
        layer, name = self.owners[0]
        return getattr(layer, name)

    @property
    def mask(self) -> Tensor:
        layer, name = self.owners[0]
        return getattr(layer, name + "_mask")

    @property
    def frozen(self) -> Tensor | None:
        """The values that its pruned weights are frozen at, zero on the mask; None if all of them are zero."""
        layer, _ = self.owners[0]
        return getattr(layer, "weight_frozen", None)

    def set_mask_(self, mask: Tensor) -> None:
        """Take a new bool mask and zero the weight, and a gradient not yet stepped, off it.

        Raises:
            ValueError: the layer is in a captured CUDA graph.
        """
        for layer, _ in self.owners:
            layer.refuse_captured("a new mask")
        for layer, name in self.owners:
            getattr(layer, name + "_mask").copy_(mask)
            layer.sync_()


def masked_weights(model: nn.Module) -> list[MaskedWeight]:
    """Every masked weight of `model`, each once, named after its layer (attention: layer and parameter).

    Raises:
        ValueError: the model has no masked layer.
    """
    found: dict[int, MaskedWeight] = {}
    for layer_name, layer in model.named_modules():
        for name in layer.masked_names() if isinstance(layer, MaskedLayer) else ():
            parts = [layer_name] if name == "weight" and layer_name else [layer_name, name]
            weight = MaskedWeight(".".join(part for part in parts if part), [])
            parameter = layer._parameters.get(name, layer)  # a packed layer has none of that name, and is not tied
            found.setdefault(id(parameter), weight).owners.append((layer, name))
    if not found:
        raise ValueError("the model has no masked layers: call lth_sparse.sparsify_(model) first")
    return list(found.values())


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the masks of `model`, by the name of the masked weight."""
    return {weight.name: weight.mask.clone() for weight in masked_weights(model)}


def set_masks_(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Give `model` masks as `get_masks` returns them; what lies off them becomes zero."""
    for weight in masked_weights(model):
        weight.set_mask_(masks[weight.name])


@torch.no_grad()
def freeze_(model: nn.Module, values: Mapping[str, Tensor] | None) -> nn.Module:
    """Hold pruned weights of `model` at other values than zero, untrained; return the model.

    The layers compute with these values, `densify_` writes them into the weights, and state dicts and files hold them;
    `weight` is zero there as ever, so that density, snapshots and optimizers know the trained weights alone. What is
    frozen stays when more is pruned, and gives way where a mask keeps the weight again.

    Args:
        values: by the names that `get_masks` returns, floating point, shaped like the weight; of each the pruned places
            count. Weights that are not named stay as they are. None makes every pruned weight zero again.

    Raises:
        ValueError: an unknown name, another shape, a weight of attention, a packed layer or one in a captured CUDA
            graph; the model is then unchanged.
    """
    refuse_packed(model, "freeze_")
    weights = {weight.name: weight for weight in masked_weights(model)}
    given = dict.fromkeys(weights) if values is None else values
    for name, value in given.items():
        _check_frozen(name, value, weights)
    for name, value in given.items():
        for layer, _ in weights[name].owners:
            layer.freeze_(value)
    return model


def _check_frozen(name, value, weights):
    if name not in weights:
        raise ValueError(f"freeze_ got values for {name!r}, which is not masked: {', '.join(weights)} can be named")
    for layer, _ in weights[name].owners:
        layer.refuse_captured("freeze_")
        if value is not None and not layer.freezes:
            raise ValueError(f"freeze_ got values for {name!r}, but weights of attention can only be pruned to zero")
    if value is not None and value.shape != weights[name].mask.shape:
        shapes = tuple(value.shape), tuple(weights[name].mask.shape)
        raise ValueError(f"freeze_ got values of shape {shapes[0]} for {name!r}, wanted shape {shapes[1]}")


def union(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that mask `a` or mask `b` keeps; both as `get_masks` returns them. ValueError unless they fit."""
    return _combine(torch.logical_or, a, b)


def intersection(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that both `a` and `b` keep, masks as `get_masks` returns them. ValueError unless they fit."""
    return _combine(torch.logical_and, a, b)


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that `a` keeps and `b` does not, masks as `get_masks` returns them. ValueError unless they fit."""
    return _combine(torch.gt, a, b)


def _combine(operator: Callable, a, b):
    shapes = [{name: tuple(mask.shape) for name, mask in masks.items()} for masks in (a, b)]
    for name in [*a, *b]:
        if shapes[0].get(name) != shapes[1].get(name):
            first, second = (f"shape {of[name]}" if name in of else "no such entry" for of in shapes)
            raise ValueError(f"the masks are not of one model: {name!r} has {first} in one, {second} in the other")
    return {name: operator(mask, b[name].to(mask.device)) for name, mask in a.items()}


def masked_layers(model: nn.Module) -> list[MaskedLayer]:
    """The masked layers of `model`, in its own order."""
    return [layer for layer in model.modules() if isinstance(layer, MaskedLayer)]


def sync_(model: nn.Module) -> nn.Module:
    """Zero every masked weight off its mask after writes that autograd cannot see (`weight.data`); return the model.

    Shadows of packed layers are refreshed, and CUDA graphs that were captured with the model count as discarded.
    """
    for layer in masked_layers(model):
        layer.sync_()
        layer.captured = False
    return model
