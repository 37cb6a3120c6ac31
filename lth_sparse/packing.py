"""Masked models to packed ones and back: `pack_`, `unpack_`, and the choice of a strategy for each layer."""

from collections.abc import Mapping

import torch
from torch import nn

from .dispatch import MASKED, Choice, Layer, choose, runnable
from .masks import masked_layers, masked_weights
from .nn import MaskedLayer
from .packed import PACKED_CLASSES, PackedLayer, product_shape


def pack_(model: nn.Module, sample=None, strategies: Mapping[str, str] | None = None) -> nn.Module:
    """Pack the masked layers that it makes faster, in place, before an optimizer is made; return the model.

    Linear and Conv2d layers in float32 or half on CUDA, Linear ones in float32 or float64 on the CPU; all others stay
    masked and compute densely. Masks, values and outputs stay; parameters become `values`, as long as what is kept.
    Of several processes each may measure otherwise: pack in one, then call `broadcast_` in all.

    Args:
        sample: a batch for `model(sample)`; with it each layer's strategies are measured at its own shapes (about a
            second per new shape, kept on disk), without it a cautious rule of thumb packs on the CPU alone.
        strategies: what to use instead of choosing, by layer name; layers not named stay masked.

    Raises:
        ValueError: no masked layer, one in a captured CUDA graph, a strategy that is unknown or cannot run here,
            pruned weights that are frozen.
    """
    for layer in masked_layers(model):
        layer.refuse_captured("pack_")
        _refuse_frozen(layer)
    if strategies is None:
        choices = choose_strategies(model, sample)
    else:
        choices = {name: _given(layer, strategies.get(name, "masked")) for name, layer in _packable(model).items()}
    for name, choice in choices.items():
        layer = model.get_submodule(name)
        layer.choice, layer.fused = choice, choice.strategy == "fused"
        if choice.strategy not in MASKED:
            layer.__class__ = PACKED_CLASSES[type(layer)]
            layer.pack_(choice.strategy)
    return model


def _refuse_frozen(layer):
    if "weight_frozen" in layer._buffers:
        raise ValueError(
            f"pack_ leaves out pruned weights, but a {type(layer).__name__} of shape {tuple(layer.weight.shape)} has "
            "frozen ones: train it masked, or call lth_sparse.freeze_(model, None) first"
        )


def choose_strategies(model: nn.Module, sample=None, forced: str = "auto") -> dict[str, Choice]:
    """What `pack_(model, sample)` would use for each layer that can be packed, by its name; `forced`: see `choose`."""
    inputs = _inputs(model, sample) if sample is not None else {}
    return {
        name: choose(_seen(layer, *inputs.get(layer, ())), layer in inputs, forced)
        for name, layer in _packable(model).items()
    }


def _packable(model) -> dict[str, MaskedLayer]:
    """The layers that can be packed, by name: their weights are not tied."""
    tied = {id(layer) for weight in masked_weights(model) if len(weight.owners) > 1 for layer, _ in weight.owners}
    return {n: layer for n, layer in model.named_modules() if type(layer) in PACKED_CLASSES and id(layer) not in tied}


def _seen(layer, shape=None, differentiated=True) -> Layer:
    """A masked layer as `dispatch` knows it, with the shape of its input and whether that gets a gradient."""
    packed = PACKED_CLASSES[type(layer)]
    return Layer(
        packed.kind, packed.to_rows(layer.weight_mask), packed.sizes(layer), layer.weight.dtype, shape, differentiated
    )


def _given(layer, strategy) -> Choice:
    able = runnable(layer.weight.device, layer.weight.dtype, PACKED_CLASSES[type(layer)].kind)
    if strategy not in able:
        raise ValueError(f"a {type(layer).__name__} can be computed by {', '.join(able)} here, got {strategy!r}")
    return Choice(strategy)


def unpack_(model: nn.Module) -> nn.Module:
    """Turn packed layers into masked ones again, with the same masks and values; return the model.

    Raises:
        ValueError: a layer is in a captured CUDA graph.
    """
    for layer in masked_layers(model):
        layer.refuse_captured("unpack_")
    for layer in masked_layers(model):
        if isinstance(layer, PackedLayer):
            layer.unpack_()
    return model


@torch.enable_grad()
def _inputs(model, sample) -> dict[nn.Module, tuple[tuple[int, ...], bool]]:
    """The shapes that the products of the layers which can be packed get when `model` is given `sample`, and whether
    these inputs get a gradient: that of a first layer does not."""
    found: dict[nn.Module, tuple[tuple[int, ...], bool]] = {}
    layers = [layer for layer in masked_layers(model) if type(layer) in PACKED_CLASSES]

    def note(layer, inputs):
        found[layer] = product_shape(layer, *inputs), inputs[0].requires_grad

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(sample)  # so that no running statistics move
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return found
