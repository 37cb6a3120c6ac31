"""Scores say which weights go: the lowest are pruned first, the highest are kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Context:
    """What a score may look at; every mapping goes from layer name to a tensor shaped like that layer's weight.

    `final` are the weights as trained, `initial` those at the start, `best` those of lowest validation loss;
    `gradients` belong to `final`; `batches` are `(images, labels)` pairs. Ingredients nobody gave are None.
    """

    final: Tensors
    masks: Tensors
    generator: torch.Generator
    initial: Tensors | None = None
    best: Tensors | None = None
    gradients: Tensors | None = None
    batches: list | None = None

    def need(self, ingredient: str):
        """The ingredient of that name; ValueError when it was not given."""
        value = getattr(self, ingredient)
        if value is None:
            raise ValueError(f"the score needs {ingredient!r}, which was not given: pass prune_(..., {ingredient}=...)")
        return value


def magnitude(context: Context) -> dict[str, Tensor]:
    """|w_final|, also called large final (Frankle & Carbin 2019, section 2)."""
    return {name: weight.abs() for name, weight in context.final.items()}


def random(context: Context) -> dict[str, Tensor]:
    """Uniform noise drawn on the CPU from the context's generator, so that it is the same on every device."""
    return {
        name: torch.rand(weight.shape, generator=context.generator).to(weight.device)
        for name, weight in context.final.items()
    }


SCORES: dict[str, Callable[[Context], Tensors]] = {"magnitude": magnitude, "random": random}


def resolve(score: str | Callable[[Context], Tensors]) -> Callable[[Context], Tensors]:
    """The function of that name, or `score` itself if it is one; ValueError for an unknown name."""
    if callable(score):
        return score
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}: choose from {', '.join(SCORES)}, or pass a function")
    return SCORES[score]


def compute(score: str | Callable[[Context], Tensors], context: Context) -> Tensors:
    """Score every layer of `context.final` and check what came out.

    Raises:
        ValueError: unknown score, a layer left out, a shape that is not the weight's, or a value that is NaN.
    """
    scores = resolve(score)(context)
    for name, weight in context.final.items():
        got = scores.get(name) if isinstance(scores, Mapping) else None
        if not isinstance(got, Tensor) or got.shape != weight.shape:
            shape = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else "no tensor"
            raise ValueError(f"the score gave {shape} for layer {name!r}, wanted shape {tuple(weight.shape)}")
        if got.isnan().any():
            raise ValueError(f"the score of layer {name!r} holds NaN: the training before it has diverged")
    return scores
