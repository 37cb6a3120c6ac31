"""Scores say which weights go: the lowest are pruned first, the highest are kept.

Only kept weights are ranked, so what a score says off the masks means nothing. w_i are the weights at the start, w_f
those as trained, L is the mean cross-entropy over `batches`. The criteria of Zhou et al. are those of "Deconstructing
Lottery Tickets" (2019, arXiv:1905.01067v4), section 2 unless said otherwise.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .masks import masked_weights

Tensors = Mapping[str, Tensor]


@dataclass
class Context:
    """What a score may look at; every mapping goes from layer name to a tensor shaped like that layer's weight.

    `final` are the weights as trained, `initial` those at the start, `best` those of lowest validation loss;
    `gradients` belong to `final`; `batches` are `(images, labels)` pairs; `model` is the one that holds `final`.
    Ingredients nobody gave are None.
    """

    final: Tensors
    masks: Tensors
    generator: torch.Generator
    initial: Tensors | None = None
    best: Tensors | None = None
    gradients: Tensors | None = None
    batches: Iterable[tuple[Tensor, Tensor]] | None = None
    model: nn.Module | None = None

    def need(self, ingredient: str):
        """The ingredient of that name; gradients nobody gave are computed from `model` and `batches`.

        Raises:
            ValueError: it was not given, or is of another model.
        """
        if ingredient == "gradients" and self.gradients is None and self.batches is not None:
            self.gradients = differentiate(self.need("model"), _cross_entropy, self.batches)
        value = getattr(self, ingredient)
        if value is None:
            instead = " or prune_(..., batches=...)" if ingredient == "gradients" else ""
            raise ValueError(
                f"the score needs {ingredient!r}, which was not given: pass prune_(..., {ingredient}=...){instead}"
            )
        if ingredient in ("initial", "best", "gradients"):
            _check(repr(ingredient), value, self.final)
        return value


Score = Callable[[Context], Tensors | None]


def differentiate(
    model: nn.Module,
    output: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, Tensor]:
    """The gradient by every masked weight of `output(model(images), labels)`, exactly zero off the masks.

    A mean over all samples of `batches`; `output` is a sum over those of one. The model is left as it was: it computes
    with copies of its parameters and buffers, of which `change(name, copy)` may make others, and in eval mode, so that
    batch norm uses its running statistics and nothing is dropped out.

    Raises:
        ValueError: no batches.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    copies = {name: change(name, tensor.detach().clone()) for name, tensor in tensors}
    names = {id(tensor): name for name, tensor in tensors}
    weights = {w.name: copies[names[id(w.parameter)]].requires_grad_() for w in masked_weights(model)}
    device = next(iter(weights.values())).device
    total, samples = [0] * len(weights), 0
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in batches:
            with torch.enable_grad():
                value = output(functional_call(model, copies, (images.to(device),)), labels.to(device))
            found = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
            total = [old + new for old, new in zip(total, found, strict=True)]
            samples += len(labels)
    finally:
        for module, flag in training.items():
            module.training = flag
    if not samples:
        raise ValueError("the score needs samples, but batches holds none: give it (images, labels) pairs")
    return {name: gradient / samples for name, gradient in zip(weights, total, strict=True)}


_cross_entropy = partial(F.cross_entropy, reduction="sum")


def _each(of_layer: Callable[..., Tensor], *ingredients: str) -> Score:
    """The score of every layer from that of one: `of_layer(final, *ingredients)`, tensors of one shape."""

    def score(context):
        given = [context.need(ingredient) for ingredient in ingredients]
        return {
            name: of_layer(weight, *(tensors[name].to(weight.device) for tensors in given))
            for name, weight in context.final.items()
        }

    return score


def _percentile(weight, mask):
    """The share of kept weights of smaller size, in [0, 1); equal ones have equal shares."""
    size = weight.abs()
    kept = size[mask].sort().values
    return torch.searchsorted(kept, size) / max(len(kept), 1) + 0 * size  # NaN stays NaN, to be refused


def random(context: Context) -> dict[str, Tensor]:
    """Uniform noise drawn on the CPU from the context's generator, so that it is the same on every device."""
    return {
        name: torch.rand(weight.shape, generator=context.generator).to(weight.device)
        for name, weight in context.final.items()
    }


def stability(context: Context) -> dict[str, Tensor] | None:
    """-|w_best - w_f|: weights that moved most since the lowest validation loss go first.

    None, nothing to prune, when no kept weight has moved.
    """
    best = context.need("best")
    moved = {name: (best[name].to(weight.device) - weight).abs() for name, weight in context.final.items()}
    if not any((moved[name] * mask).any() for name, mask in context.masks.items()):
        return None
    return {name: -distance for name, distance in moved.items()}


def lrp(context: Context) -> dict[str, Tensor]:
    """Relevance that flows through the weight: w d(logit of the true class)/dw, a mean over the samples of `batches`.

    Layer-wise relevance propagation (Bach et al. 2015, doi:10.1371/journal.pone.0130140) with epsilon = 0, which is
    input times gradient where units are piecewise linear and 0 at 0, such as ReLU and max-pooling (Ancona et al. 2018,
    arXiv:1711.06104). Signed: weights that speak against the true class go first. Pruning by it, from a few samples of
    each class: Yeom et al. 2021, arXiv:1912.08881.
    """
    batches = context.need("batches")
    gradients = differentiate(context.need("model"), lambda y, labels: y.gather(1, labels[:, None]).sum(), batches)
    return {name: weight * gradients[name] for name, weight in context.final.items()}


def synflow(context: Context) -> dict[str, Tensor]:
    """|w| dR/d|w|, R the summed outputs for an input of ones when every weight is its absolute value (float64).

    Synaptic flow (Tanaka et al. 2020, arXiv:2006.05467). Of `batches` only the shape of an image is used. Biases and
    running means count as 0, so that in a ReLU network the scores of every layer that all paths cross add up to R.
    """
    first = islice(context.need("batches"), 1)
    ones = [(torch.ones_like(images[:1], dtype=torch.float64), labels[:1]) for images, labels in first]
    gradients = differentiate(context.need("model"), lambda y, labels: y.sum(), ones, _positive)
    return {name: weight.abs() * gradients[name] for name, weight in context.final.items()}


def _positive(name, tensor):
    if not tensor.is_floating_point():
        return tensor
    return tensor.abs().double() * (not name.endswith(("bias", "running_mean")))


def resolve(score: str | Score) -> Score:
    """The function of that name, or `score` itself if it is one; ValueError for an unknown name."""
    if callable(score):
        return score
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose from {', '.join(SCORES)}, or pass a function")
    return SCORES[score]


def compute(score: str | Score, context: Context) -> Tensors | None:
    """Score every layer of `context.final` and check what came out; None when there is nothing to prune by.

    Raises:
        ValueError: unknown score, a layer left out, a shape that is not the weight's, or a value that is NaN.
    """
    scores = resolve(score)(context)
    if scores is None:
        return None
    _check("the score", scores, context.final)
    for name in context.final:
        if scores[name].isnan().any():
            raise ValueError(f"the score of layer {name!r} holds NaN: the training before it has diverged")
    return scores


def _check(what, tensors, final):
    """ValueError unless the mapping `tensors` has a tensor for each layer of `final`, of its shape."""
    for name, weight in final.items():
        got = tensors.get(name) if isinstance(tensors, Mapping) else None
        if not isinstance(got, Tensor) or got.shape != weight.shape:
            shape = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else "no tensor"
            raise ValueError(f"{what} gave {shape} for layer {name!r}, wanted shape {tuple(weight.shape)}")


SCORES: dict[str, Score] = {
    # f is w_f, i is w_i. Frankle & Carbin (2019, arXiv:1803.03635, section 2) under two names, then Zhou et al.
    "magnitude": _each(lambda f: f.abs()),
    "large-final": _each(lambda f: f.abs()),
    "small-final": _each(lambda f: -f.abs()),
    "large-init": _each(lambda f, i: i.abs(), "initial"),
    "small-init": _each(lambda f, i: -i.abs(), "initial"),
    "magnitude-increase": _each(lambda f, i: f.abs() - i.abs(), "initial"),
    "movement": _each(lambda f, i: (f - i).abs(), "initial"),
    "random": random,
    # min(alpha |w_f|, |w_i|) and -max(alpha |w_f|, |w_i|) with the alpha, layer by layer, that has w_f and w_i prune
    # equally many: at every rate the same as comparing percentiles.
    "large-init-large-final": _each(
        lambda f, i, mask: torch.minimum(_percentile(f, mask), _percentile(i, mask)), "initial", "masks"
    ),
    "small-init-small-final": _each(
        lambda f, i, mask: -torch.maximum(_percentile(f, mask), _percentile(i, mask)), "initial", "masks"
    ),
    # Section 5: 0 for weights whose sign has changed (same-sign), or has not (diff-sign); zero has a sign of its own.
    # These go first, in random order, but by magnitude increase only after those of the right sign that shrank.
    "large-final-same-sign": _each(lambda f, i: f.abs() * (f.sign() == i.sign()), "initial"),
    "large-final-diff-sign": _each(lambda f, i: f.abs() * (f.sign() != i.sign()), "initial"),
    "magnitude-increase-same-sign": _each(lambda f, i: (f.abs() - i.abs()) * (f.sign() == i.sign()), "initial"),
    "magnitude-increase-diff-sign": _each(lambda f, i: (f.abs() - i.abs()) * (f.sign() != i.sign()), "initial"),
    # How much L feels the weight go (Lee et al. 2019, arXiv:1810.02340, there before training), or move.
    "snip": _each(lambda f, gradient: (f * gradient).abs(), "gradients"),
    "gradient": _each(lambda f, gradient: gradient.abs(), "gradients"),
    "stability": stability,
    "lrp": lrp,
    "synflow": synflow,
}
