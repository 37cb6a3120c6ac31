"""What happens to the weights that stay, and to those that go: the tables KEPT and PRUNED.

Zhou, Lan, Liu and Yosinski 2019 (arXiv 1905.01067), sections 3 and 4, have most of them, as mask-1 and mask-0 actions.
All work in place after `prune_`, on a model that still holds the trained values: first
`PRUNED[name](model, start, final, generator)` on what the masks no longer keep, then
`KEPT[name](model, start, generator)` on what they keep. `start` and `final` are dense snapshots, of the initial values
and of those from before the pruning.

Kept: biases and buffers go back to `start`, but stay with "keep", and are as `reinit_` leaves them with "reinit" and
"reinit-sign". "-sign" is the sign of the initial value, zero where that is zero. The constant is the standard deviation
of all initial weights of a layer, pruned ones too. Pruned: all but "zero" and "redraw" freeze every pruned weight, also
those of former calls, at values made anew in each.

What an action draws comes from its generator on the CPU, layer by layer, and so is the same on every device; `reinit_`
and what is drawn as it does depend on the device of the model.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .masks import freeze_, get_masks, masked_layers, masked_weights, set_masks_, sync_
from .packed import PackedLayer, refuse_packed


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer of `model` (masks and frozen values excepted), by its name in `state_dict()`."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def rewind_(model: nn.Module, snap: Mapping[str, Tensor]) -> nn.Module:
    """Give the kept weights, the biases and the buffers the values of `snap`; masks stay, and what is frozen.

    Returns the model.

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
    _reset_(model, generator)
    return sync_(model)


def _reset_(model, generator):
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    with torch.random.fork_rng():
        for index, module in enumerate(reversed(list(model.modules()))):
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if reset is not None:
                torch.manual_seed(seed + index)  # anew, or what a child draws on another device would shift its parent
                reset()


def weights_of(model: nn.Module, snap: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a snapshot of `model` by the names that `get_masks` returns, on the model's devices.

    Raises:
        ValueError: a snapshot of another model; a packed layer.
    """
    refuse_packed(model, "an action on weights")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weights = {weight.name: weight.parameter for weight in masked_weights(model)}
    wanted = {names[id(parameter)]: parameter for parameter in weights.values()}
    check_same_entries("the snapshot", {name: snap[name] for name in wanted if name in snap}, wanted)
    return {name: snap[names[id(parameter)]].to(parameter.device) for name, parameter in weights.items()}


@torch.no_grad()
def _write_(model, values):
    for weight in masked_weights(model):
        weight.parameter.copy_(values[weight.name])
    sync_(model)


def _rewind(model, start, generator):
    rewind_(model, start)


def _keep(model, start, generator):
    """Kept weights go on from where training left them, and so do biases and buffers."""


def _reinit(model, start, generator):
    reinit_(model, generator)


def _reinit_sign(model, start, generator):
    initial = weights_of(model, start)
    reinit_(model, generator)
    _write_(model, {w.name: w.parameter.detach().abs() * initial[w.name].sign() for w in masked_weights(model)})


def _rewind_zero_toward(model, start, generator):
    """The second variant of section 4 beside `freeze-zero-toward`: what has moved toward zero starts there."""
    initial = weights_of(model, start)
    values = {w.name: _away_from_zero(initial[w.name], w.parameter.detach()) for w in masked_weights(model)}
    rewind_(model, start)
    _write_(model, values)


def _away_from_zero(initial, last):
    """The initial values of the weights that have not lost magnitude since, and zeros."""
    return torch.where(last.abs() < initial.abs(), 0, initial)


Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def _drawn_from_initial(draw: Draw):
    """The kept action that gives each layer's kept weights what `draw` makes of its initial weights and its mask."""

    def act(model, start, generator):
        rewind_(model, start)
        initial, masks = weights_of(model, start), get_masks(model)
        _write_(model, {name: draw(initial[name], masks[name], generator) for name in masks})

    return act


def _of_initial_sign(draw: Draw) -> Draw:
    return lambda initial, mask, generator: draw(initial, mask, generator).abs() * initial.sign()


def _signs(like, generator):
    return (torch.randint(2, like.shape, generator=generator) * 2 - 1).to(like)


def _randomly_signed(initial, mask, generator):
    return initial.abs() * _signs(initial, generator)


def _reshuffled(initial, mask, generator):
    """`initial` with the values on the mask in another order."""
    values, among = initial.clone(), initial[mask]
    values[mask] = among[torch.randperm(len(among), generator=generator).to(among.device)]
    return values


def _constant(initial, mask, generator):
    deviation = float(initial.double().cpu().std(correction=0))  # 0, not NaN, of a single weight
    return deviation * _signs(initial, generator)


KEPT: dict[str, Callable[[nn.Module, Mapping[str, Tensor], torch.Generator], None]] = {
    "rewind": _rewind,
    "rewind-random-sign": _drawn_from_initial(_randomly_signed),
    "rewind-zero-toward": _rewind_zero_toward,
    "keep": _keep,
    "reinit": _reinit,
    "reinit-sign": _reinit_sign,
    "reshuffle": _drawn_from_initial(_reshuffled),
    "reshuffle-sign": _drawn_from_initial(_of_initial_sign(_reshuffled)),
    "constant": _drawn_from_initial(_constant),
    "constant-sign": _drawn_from_initial(_of_initial_sign(_constant)),
}


def _zero(model, start, final, generator):
    freeze_(model, None)


def _freeze(model, start, final, generator):
    freeze_(model, weights_of(model, start))


def _freeze_zero_toward(model, start, final, generator):
    """The first variant of section 4. What was pruned before was trained as it is frozen, and so stays."""
    initial, last = weights_of(model, start), weights_of(model, final)
    last |= {w.name: last[w.name] + w.frozen for w in masked_weights(model) if w.frozen is not None}
    freeze_(model, {name: _away_from_zero(initial[name], last[name]) for name in initial})


def _freeze_reinit(model, start, final, generator):
    freeze_(model, _drawn(model, generator))


def _freeze_reshuffle(model, start, final, generator):
    initial, masks = weights_of(model, start), get_masks(model)
    freeze_(model, {name: _reshuffled(initial[name], ~mask, generator) for name, mask in masks.items()})


def _redraw(model, start, final, generator):
    """Pruned weights are drawn anew and kept again, so that the next training may make more of them."""
    drawn, masks = _drawn(model, generator), get_masks(model)
    values = {w.name: torch.where(w.mask, w.parameter.detach(), drawn[w.name]) for w in masked_weights(model)}
    set_masks_(model, {name: torch.ones_like(mask) for name, mask in masks.items()})
    _write_(model, values)


def _drawn(model, generator):
    """The weights, pruned ones too, that `reinit_` would give the model, which stays as it is."""
    before = snapshot(model)
    _reset_(model, generator)
    drawn = {weight.name: weight.parameter.detach().clone() for weight in masked_weights(model)}
    rewind_(model, before)
    return drawn


PRUNED: dict[str, Callable[[nn.Module, Mapping[str, Tensor], Mapping[str, Tensor], torch.Generator], None]] = {
    "zero": _zero,
    "freeze": _freeze,
    "freeze-zero-toward": _freeze_zero_toward,
    "freeze-reinit": _freeze_reinit,
    "freeze-reshuffle": _freeze_reshuffle,
    "redraw": _redraw,
}


def check_same_entries(what: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """ValueError that names the first entry of `given` which `wanted` does not have alike."""
    for name in [*wanted, *given]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (given, wanted)]
        if shapes[0] != shapes[1]:
            got, want = ("no such entry" if shape is None else f"shape {shape}" for shape in shapes)
            raise ValueError(f"{what} is of another model: {name!r} has {got} there, {want} in the model")


def _tensors(model):
    """Parameters and buffers by name, those of ours excepted: masks and frozen values."""
    ours = {
        id(buffer)
        for layer in masked_layers(model)
        for name, buffer in layer._buffers.items()
        if name.endswith(("_mask", "_frozen"))
    }
    packed = {id(layer.values): layer for layer in masked_layers(model) if isinstance(layer, PackedLayer)}
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in packed:  # under the name and in the shape of the masked state
            tensors[name.removesuffix("values") + "weight"] = packed[id(tensor)].weight
        elif id(tensor) not in ours:
            tensors[name] = tensor
    return tensors
