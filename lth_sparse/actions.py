"""What happens to the weights that stay: rewound to a snapshot, or drawn anew."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .masks import masked_layers, sync_
from .packed import PackedLayer, refuse_packed


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer of `model` (masks excepted), by its name in `state_dict()`."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def rewind_(model: nn.Module, snap: Mapping[str, Tensor]) -> nn.Module:
    """Give the kept weights, the biases and the buffers the values of `snap`; masks stay. Returns the model.

    Raises:
        ValueError: `snap` lacks an entry of the model, has one more, or one of another shape; a packed layer.
    """
    refuse_packed(model, "rewind_")
    tensors = _tensors(model)
    check_same_entries("the snapshot", snap, tensors)
    for name, tensor in tensors.items():
        tensor.copy_(snap[name])
    return sync_(model)


def reinit_(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw all values anew as the model's own constructors would, seeded by `generator`; masks stay.

    Calls `reset_parameters` (attention: `_reset_parameters`) of every module that has it, children before their
    parents, so a network that defines its own initialisation has the last word. Parameters that no module resets
    (a bare `nn.Parameter`) keep their values. torch's global random state is left as it was. Returns the model.

    Raises:
        ValueError: a packed layer.
    """
    refuse_packed(model, "reinit_")
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        for index, module in enumerate(reversed(list(model.modules()))):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                torch.manual_seed(seed + index)  # anew, or what a child draws on another device would shift its parent
                reset()
    return sync_(model)


def check_same_entries(what: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError that names the first entry of `given` which `wanted` does not have alike."""
    for name in [*wanted, *given]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (given, wanted)]
        if shapes[0] != shapes[1]:
            got, want = ("no such entry" if shape is None else f"shape {shape}" for shape in shapes)
            raise ValueError(f"{what} is of another model: {name!r} has {got} there, {want} in the model")


def _tensors(model):
    """Parameters and buffers by name, masks excepted."""
    masks = {id(getattr(layer, name + "_mask")) for layer in masked_layers(model) for name in layer.masked_names()}
    packed = {id(layer.values): layer for layer in masked_layers(model) if isinstance(layer, PackedLayer)}
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in packed:  # under the name and in the shape of the masked state
            tensors[name.removesuffix("values") + "weight"] = packed[id(tensor)].weight
        elif id(tensor) not in masks:
            tensors[name] = tensor
    return tensors
