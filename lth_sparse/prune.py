"""Masks from scores: exact counts, seeded ties, per layer or over the whole model."""

from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor, nn, optim

from . import scores as _scores
from .convert import match
from .hooks import carry_state_
from .masks import MaskedWeight, masked_weights
from .packed import refuse_packed

SCOPES = ("layer", "global", "erk")


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
        score: a name of `scores.SCORES` or `f(Context) -> {layer: tensor}`; higher is kept. None instead of a mapping
            says that there is nothing to prune by, and leaves the model as it is.
        scope: "layer" ranks within each layer, "global" over all layers together; "erk" ranks within each layer too,
            and shares what stays of all of them out as Erdos-Renyi kernels do: see `erk_counts`.
        rates: layer name pattern -> its own rate in [0, 1), instead of `rate`; with the scopes "global" and "erk" only
            0, which keeps that layer whole.
        optimizer: its state is zeroed off the new masks, so that it can go on.
        keep_at_least: no layer is left with fewer weights than this.
        ingredients: `initial`, `best`, `gradients`, `batches` (see `scores.Context`) for scores that look at more than
            the weights.

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
    context = _scores.Context(final, masks, generator, model=model, **ingredients)
    values = _scores.compute(score, context)
    if values is None:  # nothing to prune by
        return model
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


def rate_to_reach(density: float, rounds: int) -> float:
    """The rate that leaves `density` of the weights when it is pruned `rounds` times: 1 - density ** (1 / rounds).

    Raises:
        ValueError: a density outside (0, 1), fewer than one round.
    """
    check_rate(density, "density")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    return 1 - density ** (1 / rounds)


def layer_rates(weights: list[MaskedWeight], rate: float, scope: str, rates: Mapping[str, float]) -> dict[str, float]:
    """The rate of each weight by its name, from what `prune_` is given; ValueError as `prune_` raises it."""
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: choose from {', '.join(SCOPES)}")
    names = [w.name for w in weights]
    rate_of = dict.fromkeys(names, check_rate(rate))
    for pattern, own in rates.items():
        check_rate(own, f"the rate of {pattern!r}", zero=True)
        if scope != "layer" and own != 0:
            raise ValueError(f"scope {scope!r} prunes at one rate; {pattern!r} may only be 0 (kept whole), got {own}")
        rate_of |= dict.fromkeys(match(names, pattern), own)
    return rate_of


def _lowest_out(values, masks, rate_of, scope, keep_at_least, generator) -> dict[str, Tensor]:
    names = [name for name in masks if rate_of[name] > 0]
    if not names:
        return {}
    pools = [names] if scope == "global" else [[name] for name in names]
    shares = erk_counts({n: masks[n] for n in names}, rate_of[names[0]], keep_at_least) if scope == "erk" else {}
    new_masks = {}
    for pool in pools:
        value = {name: _comparable(values[name]) for name in pool}
        free = torch.cat([_free(value[name], masks[name].flatten(), keep_at_least, generator) for name in pool])
        mask = torch.cat([masks[name].flatten() for name in pool])
        kept = int(mask.count_nonzero())
        count = kept - shares[pool[0]] if shares else round(rate_of[pool[0]] * kept)
        gone = lowest(torch.cat(list(value.values())), free, min(count, int(free.count_nonzero())), generator)
        sizes = [masks[name].numel() for name in pool]
        for name, part in zip(pool, (mask & ~gone).split(sizes), strict=True):
            new_masks[name] = part.view_as(masks[name])
    return new_masks


def erk_counts(masks: Mapping[str, Tensor], rate: float, least: int = 0) -> dict[str, int]:
    """How many weights each layer keeps when `round(rate * kept)` of all of them go, by its name.

    The density of a layer is proportional to the sum of the dimensions of its weight over their product, those of a
    convolution's kernel included (Erdos-Renyi-kernel: Evci et al. 2020, arXiv:1911.11134, section 3; without the kernel
    Mocanu et al. 2018), so its count is proportional to their sum. No layer keeps more than it has, or fewer than
    `least` if it has them; the others share the difference. Fractions go to those of largest remainder, the first of
    equal ones.
    """
    sizes = {name: sum(mask.shape) for name, mask in masks.items()}
    most = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    least_of = {name: min(kept, least) for name, kept in most.items()}
    kept = sum(most.values())
    total = max(kept - round(rate * kept), sum(least_of.values()))
    shares = _shares(total, sizes, least_of, most)
    counts = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    return counts | {name: counts[name] + 1 for name in by_remainder[: total - sum(counts.values())]}


def _shares(total, sizes, least, most) -> dict[str, Fraction]:
    """`total` shared in proportion to `sizes`, each share within its bounds; exact."""
    settled: dict[str, Fraction] = {}
    while True:
        free = [name for name in sizes if name not in settled]
        scale = Fraction(total - sum(settled.values()), sum(sizes[name] for name in free) or 1)
        shares = settled | {name: min(max(scale * sizes[name], least[name]), most[name]) for name in free}
        missing = total - sum(shares.values())
        if missing == 0:
            return shares
        # Cutting to size made too little or too much: the scale only moves the other way, so those at a bound stay.
        bounds = most if missing > 0 else least
        settled = {name: share for name, share in shares.items() if name in settled or share == bounds[name]}


def _comparable(score: Tensor) -> Tensor:
    """Flat, and wide enough that casting makes no ties."""
    return score.detach().flatten().to(torch.promote_types(score.dtype, torch.float32))


def _free(value: Tensor, mask: Tensor, count: int, generator) -> Tensor:
    """The kept weights but for the `count` of highest value."""
    return lowest(value, mask, max(int(mask.count_nonzero()) - count, 0), generator) if count else mask


def lowest(value: Tensor, among: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mark exactly `count` entries of lowest `value` among the marked ones; ties are drawn from `generator`.

    Args: value float [n]; among bool [n]; count <= among.sum(). Returns bool [n].
    """
    if count == 0:
        return torch.zeros_like(among)
    threshold = _kth_lowest(value.detach(), among, count)
    below = among & (value < threshold)
    ties = (among & (value == threshold)).nonzero().flatten()
    # Drawn on the CPU, so that the same seed breaks ties alike on every device.
    drawn = torch.randperm(len(ties), generator=generator)[: count - int(below.count_nonzero())]
    below[ties[drawn.to(ties.device)]] = True
    return below


def _kth_lowest(value, among, count):
    if value.device.type != "cpu":
        return value[among].kthvalue(count).values
    # Of 100 million values on two cores numpy selects in 0.2 to 0.6 s, torch in 2.6 to 3.2 s.
    chosen = value.numpy()[among.numpy()]
    chosen.partition(count - 1)
    return chosen[count - 1].item()
