"""Iterative magnitude pruning: train, score, prune, rewind, again; for one model or many arms and trials.

The loop is `search`; `find_ticket` runs it over a user's own `train`, `experiment.run` over a recipe.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import runs, scores
from .actions import reinit_, rewind_, snapshot
from .convert import density
from .masks import get_masks, masked_weights, set_masks_
from .prune import layer_rates, prune_
from .training import Result, Ticket

Masks = dict[str, Tensor]


class Arm(NamedTuple):
    """What an arm does between rounds: whose masks it takes, whether it rewinds, and its own score if it has one."""

    masks_of: str | None = None
    rewinds: bool = False
    score: str | None = None


ARMS = {
    "ticket": Arm(rewinds=True),
    "reinit": Arm(masks_of="ticket"),
    "reinit-chain": Arm(),
    "random": Arm(score="random"),
}


@dataclass
class Chain:
    """One arm of one trial on its way through the rounds.

    `masks[r]` are the masks of round r, `finished` the rounds that are done, `start` the values to rewind to. An arm
    ends early with `status` "collapsed" (pruning emptied a layer) or "diverged".
    """

    model: nn.Module
    seed: int
    arm: str = "ticket"
    trial: int = 0
    pruning: dict = field(default_factory=dict)
    start: Mapping[str, Tensor] | None = None
    leader: "Chain | None" = None
    rewind: int = 0
    folder: Path | None = None
    status: str = "done"
    masks: dict[int, Masks] = field(default_factory=dict)
    finished: dict[int, dict] = field(default_factory=dict)

    def is_ready(self, round: int) -> bool:
        """Whether `round` is the next to train."""
        self.masks.setdefault(0, get_masks(self.model))
        if self.leader and round in self.leader.masks:
            self.masks[round] = self.leader.masks[round]
        return self.status == "done" and round not in self.finished and round in self.masks

    def prepare(self, round: int) -> Ticket:
        """Give the model the masks and the starting values of `round`."""
        set_masks_(self.model, self.masks[round])
        rewound = ARMS[self.arm].rewinds and round > 0
        if rewound:
            rewind_(self.model, self.start)
        elif self.start is None:
            reinit_(self.model, self.generator("values", round))
            if ARMS[self.arm].rewinds:
                self.start = snapshot(self.model)
        folder = self.folder and runs.round_folder(self.folder, self.arm, self.trial, round)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        order = self.generator("order", round).initial_seed()
        keep_at = self.rewind if self.rewind and ARMS[self.arm].rewinds and round == 0 else None
        return Ticket(self.model, self.label(round), order, self.rewind if rewound else 0, keep_at, folder)

    def advance(self, round: int, result: Result, last: bool) -> None:
        """Take the result of `round` and make the masks of the next, unless it is the last or there can be none."""
        self.start = result.kept or self.start
        self.status = result.status
        if self.status == "done" and self.leader is None and not last:
            ingredients = {"best": _weights_of(self.model, result.best)} if result.best else {}
            prune_(self.model, generator=self.generator("ties", round), **self.pruning, **ingredients)
            masks = get_masks(self.model)
            if all(mask.any() for mask in masks.values()):
                self.masks[round + 1] = masks
            else:
                self.status = "collapsed"

    def generator(self, purpose: str, round: int) -> torch.Generator:
        """A random stream of its own for each purpose, arm, trial and round."""
        text = f"{self.seed}/{purpose}/{self.arm}/{self.trial}/{round}"
        return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))

    def label(self, round: int) -> str:
        return f"{self.arm}/trial_{self.trial}/round_{round:02d}"


def search(
    chains: list[Chain],
    train: Callable[[list[Ticket]], list[Result]],
    rounds: int,
    record: Callable[[Chain, int, Result], None],
) -> None:
    """Take every chain through rounds 0 (dense) to `rounds`; rounds already finished are left out.

    `train` is given the tickets of one round and returns their results in order; `record` is called for each once
    its chain has the next masks.
    """
    for round in range(rounds + 1):
        take_round(chains, train, round, round == rounds, record)


def take_round(chains: list[Chain], train, round: int, last: bool, record) -> None:
    """Train the chains that are ready for `round`, and prune them unless it is the last; arguments as of `search`."""
    ready = [chain for chain in chains if chain.is_ready(round)]
    results = train([chain.prepare(round) for chain in ready]) if ready else []
    for chain, result in zip(ready, results, strict=True):
        kept = {w.name: [int(w.mask.sum()), w.mask.numel()] for w in masked_weights(chain.model)}
        chain.finished[round] = {"density": density(chain.model), "kept": kept}
        chain.advance(round, result, last)
        record(chain, round, result)


@dataclass(frozen=True)
class Round:
    """One round of `find_ticket`: `metrics` as `train` returned them, and the ticket it trained."""

    round: int
    density: float
    metrics: object
    masks: Masks
    start: Mapping[str, Tensor]

    def ticket_(self, model: nn.Module) -> nn.Module:
        """Make `model` this round's ticket: its masks, and the values it started from. Returns the model."""
        set_masks_(model, self.masks)
        return rewind_(model, self.start)


def find_ticket(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    rounds: int = 15,
    rate: float = 0.2,
    rewind: Mapping[str, Tensor] | None = None,
    on_metrics: Callable[[dict], None] | None = None,
    **pruning,
) -> list[Round]:
    """Prune a masked `model` iteratively around your own training; round 0 trains it as it is.

    Args:
        train: trains the model in place, with a new optimizer each time, and returns metrics of any kind.
        rounds: how often to prune.
        rewind: values to go back to after each round, a `snapshot`; those at the call unless given.
        on_metrics: called with {"round", "density", "metrics"} after each round.
        pruning: more arguments of `prune_` (score, scope, rates, keep_at_least).

    Returns:
        rounds 0 to `rounds`, fewer if a pruning empties a layer; `rounds[i].ticket_(model)` brings a ticket back.

    Raises:
        ValueError: no masked layer, a rate or a number of rounds out of range, an unknown score, scope or layer.
    """
    if rounds < 0:
        raise ValueError(f"rounds must be 0 or more, got {rounds}")
    # now, not after a round of training
    layer_rates(masked_weights(model), rate, pruning.get("scope", "layer"), pruning.get("rates") or {})
    scores.resolve(pruning.get("score", "magnitude"))
    start = dict(rewind) if rewind is not None else snapshot(model)
    chain = Chain(model, seed=0, pruning={"rate": rate, **pruning}, start=start)
    found = []

    def record(chain, round, result):
        found.append(Round(round, chain.finished[round]["density"], result.metrics, chain.masks[round], start))
        if on_metrics:
            on_metrics({"round": round, "density": found[-1].density, "metrics": result.metrics})

    search([chain], lambda tickets: [Result(metrics=train(ticket.model)) for ticket in tickets], rounds, record)
    return found


def _weights_of(model, snap):
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    return {weight.name: snap[parameters[id(weight.parameter)]] for weight in masked_weights(model)}
