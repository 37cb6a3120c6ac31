"""Which tickets train together, and how each of their layers is computed."""

from typing import NamedTuple

from .. import runs
from ..data import Data
from ..packing import choose_strategies
from ..recipe import Recipe
from . import stack
from .network import Network
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
    return shapes, ticket.start, ticket.keep_at


def _stacks(model, recipe) -> bool:
    exact = recipe.precision == "fp32" or recipe.device == "cuda"  # bf16 on the CPU is autocast's
    return exact and recipe.augmentation == "none" and perceptron(model) is not None


def _plan(tickets, data, recipe) -> Plan:
    models = [ticket.model for ticket in tickets]
    kind = Stack if _stacks(models[0], recipe) else Network
    folders = [ticket.folder for ticket in tickets if ticket.folder is not None]
    if folders and all((folder / _FILE).exists() for folder in folders):
        return Plan(tickets, kind, runs.read_json(folders[0] / _FILE))
    if kind is Stack:
        chosen = stack.strategies(models, recipe)
    else:
        sample = data.inputs(data.train.images[: recipe.batch_size])
        choices = choose_strategies(models[0], sample, recipe.strategy)
        chosen = {name: choice.strategy for name, choice in choices.items()}
    for folder in folders:
        runs.write_json(folder / _FILE, chosen)
    return Plan(tickets, kind, chosen)
