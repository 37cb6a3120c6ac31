"""The masks of a whole model: each masked weight once, however many layers share it."""

from typing import NamedTuple

from torch import Tensor, nn

from .nn import MaskedLayer


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
