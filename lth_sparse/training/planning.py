"""Which tickets train together, and how each of their layers is computed."""

from dataclasses import replace
from typing import NamedTuple

from .. import runs
from ..data import Data
from ..packing import choose_strategies
from ..recipe import Recipe
from . import programs, stack
from .network import Network
from .programs import Programs
from .stack import Stack, perceptron
from .tickets import Ticket

_FILE = "strategies.json"


class Plan(NamedTuple):
    """Tickets to train together, by what, and the strategy of each layer."""

    tickets: list[Ticket]
    kind: type[Stack | Network]
    strategies: dict[str, str]


def plans(tickets: list[Ticket], data: Data, recipe: Recipe) -> list[Plan]:
    """Every ticket in a plan. Strategies are measured once and written to the tickets' folders before any step.

    Tickets resumed are computed as before, so that they come to the same bits.
    """
    groups: dict[object, list[Ticket]] = {}
    for number, ticket in enumerate(tickets):
        ticket.model.to(recipe.device)
        groups.setdefault(_key(ticket, number, recipe), []).append(ticket)
    return [_plan(group, data, recipe) for group in groups.values()]


def _key(ticket, number, recipe):
    """Equal for tickets that train together: perceptrons on CUDA with layers of the same shapes and the same start."""
    if recipe.device != "cuda" or not _stacks(ticket.model, recipe):
        return number
    shapes = tuple((name, layer.weight.shape) for name, layer in perceptron(ticket.model).items())
    return shapes, ticket.start, ticket.keep_at, ticket.fine_tune


def _stacks(model, recipe) -> bool:
    exact = recipe.precision == "fp32" or recipe.device == "cuda"  # bf16 on the CPU is autocast's
    plain = recipe.augmentation == "none" and recipe.loss == "cross-entropy" and not recipe.perturbation
    plain = plain and recipe.optimizer != "radam" and not _is_frozen(model)
    return exact and plain and perceptron(model) is not None


def _is_frozen(model) -> bool:
    """Whether pruned weights stay at values of their own, which only the masked state of a network has."""
    return any(getattr(module, "weight_frozen", None) is not None for module in model.modules())


def _plan(tickets, data, recipe) -> Plan:
    models = [ticket.model for ticket in tickets]
    folders = [ticket.folder for ticket in tickets if ticket.folder is not None]
    if folders and all((folder / _FILE).exists() for folder in folders):
        chosen = runs.read_json(folders[0] / _FILE, {str: str})
    else:
        chosen = _choose(models, data, recipe)
        for folder in folders:
            runs.store(folder / _FILE, chosen)
    return Plan(tickets, _kind(models[0], recipe, chosen), chosen)


def _choose(models, data, recipe) -> dict[str, str]:
    stacks = _stacks(models[0], recipe)
    # "auto" does not choose it: no GPU has run it yet, and that its phases do not race is only argued by hand
    if recipe.strategy == "trainer":
        programs.check(models[0], data, recipe)
        if stacks and programs.fits(models, recipe):
            return dict.fromkeys(perceptron(models[0]), "trainer")
        recipe = replace(recipe, strategy="auto")  # as in the first rounds of every search
    if stacks:
        return stack.strategies(models, recipe)
    sample = data.inputs(data.train.images[: recipe.batch_size])
    forced = "masked" if _is_frozen(models[0]) or recipe.perturbation else recipe.strategy
    return {name: choice.strategy for name, choice in choose_strategies(models[0], sample, forced).items()}


def _kind(model, recipe, strategies) -> type[Stack | Network]:
    if not _stacks(model, recipe):
        return Network
    return Programs if "trainer" in strategies.values() else Stack
