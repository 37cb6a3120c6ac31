"""The optimizer and the learning rate that a recipe asks for."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import RAdam

from .. import optim
from ..recipe import Recipe


def make_optimizer(parameters: Iterable[Tensor], recipe: Recipe):
    """A fresh optimizer as the recipe says; every training has one of its own."""
    options = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        return optim.SGD(parameters, momentum=recipe.momentum, **options)
    if recipe.optimizer == "radam":
        return RAdam(parameters, **options)
    return (optim.Adam if recipe.optimizer == "adam" else optim.AdamW)(parameters, **options)


def learning_rate(recipe: Recipe, iteration: int, fine_tune: bool = False) -> float:
    """Linear warmup from 0, then a tenth at each milestone (paper, section 4 and appendix I).

    To fine-tune is to train at the last of these rates from the start.
    """
    if fine_tune:
        return recipe.lr * 0.1 ** len(recipe.milestones)
    rate = recipe.lr * 0.1 ** sum(iteration >= milestone for milestone in recipe.milestones)
    return rate * min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else rate
