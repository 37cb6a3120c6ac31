"""Masks from scores: exact counts, seeded ties, per layer or over the whole model."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn, optim

from . import scores as _scores
from .convert import match
from .hooks import carry_state_
from .masks import MaskedWeight, masked_weights
from .packed import refuse_packed

SCOPES = ("layer", "global")


def prune_(
    model: nn.Module,
    rate: float = 0.2,
    score: str | Callable = "magnitude",
    scope: str = "layer",
    rates: Mapping[str, float] | None = None,
    optimizer: optim.Optimizer | None = None,
    *,
    keep_at_least: int = 0,
    generator: torch.Generator | None = None,
    **ingredients,
) -> nn.Module:
    """Prune a fraction of the kept weights of every masked layer, in place; return the model.

    Exactly `round(rate * kept)` weights go, those of lowest score, ties chosen by `generator` (seed 0 unless
    given). Kept weights keep their values. Biases and normalisation are never pruned.

    Args:
        rate: fraction of the kept weights, in (0, 1).
        score: a name of `scores.SCORES` or `f(Context) -> {layer: tensor}`; higher is kept.
        scope: "layer" ranks within each layer, "global" over all layers together.
        rates: layer name pattern -> its own rate in [0, 1), instead of `rate`; with the global scope only 0,
            which keeps that layer whole.
        optimizer: its state is zeroed off the new masks, so that it can go on.
        keep_at_least: no layer is left with fewer weights than this.
        ingredients: `initial`, `best`, `gradients`, `batches` for scores that look at more than the weights.

    Raises:
        ValueError: a rate out of range, an unknown score, scope or layer, no masked layer, a missing ingredient.
    """
    refuse_packed(model, "prune_")
    weights = masked_weights(model)
    rate_of = layer_rates(weights, rate, scope, rates or {})
    if keep_at_least < 0:
        raise ValueError(f"keep_at_least must be 0 or more, got {keep_at_least}")
    generator = generator or torch.Generator().manual_seed(0)
    final = {w.name: w.parameter.detach() for w in weights}
    masks = {w.name: w.mask for w in weights}
    context = _scores.Context(final, masks, generator, **ingredients)
    values = _scores.compute(score, context)
    new_masks = _lowest_out(values, masks, rate_of, scope, keep_at_least, generator)
    for weight in weights:
        if weight.name in new_masks:
            weight.set_mask_(new_masks[weight.name])
            if optimizer is not None:
                carry_state_(optimizer, weight.parameter, weight.mask)
    return model


def check_rate(rate: float, name: str = "rate", zero: bool = False) -> float:
    """`rate` itself; ValueError unless it lies in (0, 1), or [0, 1) with `zero`."""
    if not (0 < rate < 1 or (zero and rate == 0)):  # also false for NaN
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, 1), got {rate}")
    return rate


def layer_rates(weights: list[MaskedWeight], rate: float, scope: str, rates: Mapping[str, float]) -> dict[str, float]:
    """The rate of each weight by its name, from what `prune_` is given; ValueError as `prune_` raises it."""
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
    names = [w.name for w in weights]
    rate_of = dict.fromkeys(names, check_rate(rate))
    for pattern, own in rates.items():
        check_rate(own, f"the rate of {pattern!r}", zero=True)
        if scope == "global" and own != 0:
            raise ValueError(f"scope 'global' prunes at one rate; {pattern!r} may only be 0 (kept whole), got {own}")
        rate_of |= dict.fromkeys(match(names, pattern), own)
    return rate_of


def _lowest_out(values, masks, rate_of, scope, keep_at_least, generator) -> dict[str, Tensor]:
    names = [name for name in masks if rate_of[name] > 0]
    pools = [[name] for name in names] if scope == "layer" else [names]
    new_masks = {}
    for pool in filter(None, pools):
        value = {name: _comparable(values[name]) for name in pool}
        held = [_protected(value[name], masks[name].flatten(), keep_at_least, generator) for name in pool]
        mask = torch.cat([masks[name].flatten() for name in pool])
        free = mask & ~torch.cat(held)
        count = min(round(rate_of[pool[0]] * int(mask.sum())), int(free.sum()))
        kept = mask & ~lowest(torch.cat(list(value.values())), free, count, generator)
        sizes = [masks[name].numel() for name in pool]
        for name, part in zip(pool, kept.split(sizes), strict=True):
            new_masks[name] = part.view_as(masks[name])
    return new_masks


def _comparable(score: Tensor) -> Tensor:
    """Flat, and wide enough that casting makes no ties."""
    return score.detach().flatten().to(torch.promote_types(score.dtype, torch.float32))


def _protected(value: Tensor, mask: Tensor, count: int, generator) -> Tensor:
    """The `count` kept weights of highest value."""
    if count == 0:
        return torch.zeros_like(mask)
    return mask & ~lowest(value, mask, max(int(mask.sum()) - count, 0), generator)


def lowest(value: Tensor, among: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mark exactly `count` entries of lowest `value` among the marked ones; ties are drawn from `generator`.

    Args: value float [n]; among bool [n]; count <= among.sum(). Returns bool [n].
    """
    if count == 0:
        return torch.zeros_like(among)
    threshold = value[among].kthvalue(count).values
    below = among & (value < threshold)
    ties = (among & (value == threshold)).nonzero().flatten()
    # Drawn on the CPU, so that the same seed breaks ties alike on every device.
    drawn = torch.randperm(len(ties), generator=generator)[: count - int(below.sum())]
    below[ties[drawn.to(ties.device)]] = True
    return below
