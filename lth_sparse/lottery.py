"""Iterative magnitude pruning: train, score, prune, rewind, again; for one model or many arms and trials.

The loop is `search`; `find_ticket` runs it over a user's own `train`, `experiment.run` over a recipe.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from . import runs, scores
from .actions import KEPT, PRUNED, reinit_, rewind_, snapshot, weights_of
from .arms import ARMS, Arm
from .convert import density
from .masks import freeze_, get_masks, masked_weights, set_masks_
from .prune import layer_rates, prune_
from .structured import prune_units_
from .training import Result, Ticket

Masks = dict[str, Tensor]


@dataclass
class Chain:
    """One arm of one trial on its way through the rounds.

    `masks[r]` are the masks of round r, `finished` the rounds that are done, `initial` the values to begin with where
    the seed does not give them, `start` those to rewind to, `carried` the values and the frozen weights of rounds that
    go on from the one before; `taken`: masks and `start` are another run's. `batches` are for scores that look at
    data. An arm ends early with `status` "collapsed" (pruning emptied a layer) or "diverged".
    """

    model: nn.Module
    seed: int
    arm: str = "ticket"
    trial: int = 0
    pruning: dict = field(default_factory=dict)
    start: Mapping[str, Tensor] | None = None
    initial: Mapping[str, Tensor] | None = None
    leaders: "tuple[Chain, ...]" = ()
    rewind: int = 0
    folder: Path | None = None
    batches: list | None = None
    status: str = "done"
    masks: dict[int, Masks] = field(default_factory=dict)
    finished: dict[int, dict] = field(default_factory=dict)
    carried: dict[int, tuple[Masks, Masks]] = field(default_factory=dict)
    taken: bool = False

    @property
    def rule(self) -> Arm:
        return ARMS[self.arm]

    @property
    def compares(self) -> bool:
        """Whether weights go by how the final ones differ from the best, so that both are stored."""
        return self.pruning.get("score") == "stability"

    def is_ready(self, round: int) -> bool:
        """Whether `round` is the next to train."""
        self.masks.setdefault(0, get_masks(self.model))
        if self.leaders and all(round in leader.masks for leader in self.leaders):
            given = [leader.masks[round] for leader in self.leaders]
            self.masks[round] = self.rule.combine(*given) if self.rule.combine else given[0]
        return self.status == "done" and round not in self.finished and round in self.masks

    def begin(self, rounds: int) -> None:
        """Make the masks that come before any training."""
        if self.rule.prunes == "start" and self.is_ready(0) and 1 not in self.masks:
            self._take_values(0)
            values = snapshot(self.model)
            self._prune(range(rounds))
            self.become(0, values)

    def prepare(self, round: int) -> Ticket:
        """Give the model the masks and the starting values of `round`."""
        self._take_values(round)
        folder = self.folder and runs.round_folder(self.folder, self.arm, self.trial, round)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        order = self.generator("order", round, self.rule.own_order).initial_seed()
        keeps = self.rewind and not self.rule.is_fresh and round == 0 and not self.taken
        begins = round > 0 and not self.rule.is_fresh and not self.rule.fine_tunes
        return Ticket(
            self.model,
            self.label(round),
            order,
            start=self.rewind if begins else 0,
            keep_at=self.rewind if keeps else None,
            folder=folder,
            fine_tune=self.rule.fine_tunes and round > 0,
        )

    def advance(self, round: int, result: Result, rounds: int) -> None:
        """Take the result of `round`, and make the next masks unless it is the last or another arm's are taken."""
        self.start = result.kept or self.start
        self.status = result.status
        if self.status != "done" or self.leaders or round == rounds:
            return
        if round + 1 not in self.masks and (self.rule.prunes == "each" or round == 0):
            best = {"best": weights_of(self.model, result.best)} if result.best else {}
            self._prune(range(round, rounds if self.rule.prunes == "once" else round + 1), **best)
        if round + 1 not in self.masks:
            self.status = "collapsed"

    def become(self, round: int, values: Mapping[str, Tensor]) -> nn.Module:
        """Make the model what it was in `round`, with these values."""
        set_masks_(self.model, self.masks[round])
        freeze_(self.model, None)
        freeze_(self.model, self.carried[round][1] if round in self.carried else {})
        return rewind_(self.model, values)

    def draw_(self) -> nn.Module:
        """Give the model the initial values that the seed stands for."""
        return reinit_(self.model, self.generator("values", 0, own=False))

    def alike(self, round: int) -> tuple:
        """Equal for chains that are the same ticket in `round`: arms part after the dense one."""
        dense = round == 0 and not self.rule.is_fresh and self.initial is None
        return (self.trial, self.rule.own_order and self.arm) if dense else (self.trial, self.arm, round)

    def generator(self, purpose: str, round: int, own: bool = True) -> torch.Generator:
        """A random stream for each purpose, trial and round, and for each arm unless it is not to have its own."""
        text = f"{self.seed}/{purpose}/{self.arm if own else 'ticket'}/{self.trial}/{round}"
        return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))

    def label(self, round: int) -> str:
        return f"{self.arm}/trial_{self.trial}/round_{round:02d}"

    def _take_values(self, round):
        set_masks_(self.model, self.masks[round])
        if self.rule.is_fresh and (round or self.start is None):
            reinit_(self.model, self.generator("values", round))
        elif self.initial is not None and round == 0:
            self.start = self.start or self.initial
            rewind_(self.model, self.initial)
        elif self.start is None:
            self.draw_()
            self.start = snapshot(self.model)
        elif round in self.carried:
            values, _ = self.carried[round]
            self.start = values if self.rule.pruned == "redraw" else self.start
            self.become(round, values)
        elif round:
            start = self.leaders[0].start if self.leaders else self.start
            KEPT[self.rule.kept](self.model, start, self.generator("actions", round))

    def _prune(self, rounds, **ingredients):
        """Make the masks that follow each of `rounds` from the weights as they are, until they would empty a layer."""
        final, start = snapshot(self.model), self.start or {}
        ingredients |= {"batches": self.batches, "initial": weights_of(self.model, start) if start else None}
        for round in rounds:
            generator = self.generator("ties", round)
            for _ in range(self.rule.substeps):
                prune = prune_units_ if self.rule.units else prune_
                prune(self.model, generator=generator, **self._pruning(round), **ingredients)
            masks = get_masks(self.model)
            if not all(mask.any() for mask in masks.values()):
                self.become(round, final)
                return
            if self.rule.carries:
                self._carry(round, final, masks)
            self.masks[round + 1] = get_masks(self.model)

    def _carry(self, round, final, masks):
        """Act on the weights that `masks` keep and prune after `round`, and keep what the next begins with."""
        generator = self.generator("actions", round)
        PRUNED[self.rule.pruned](self.model, self.start, final, generator)
        redraws = self.rule.pruned == "redraw"
        start = merged(masks, self.start, snapshot(self.model)) if redraws else self.start
        KEPT[self.rule.kept](self.model, start, generator)
        last = {round: self.carried[round]} if round in self.carried else {}
        self.carried = last | {round + 1: (snapshot(self.model), frozen_weights(self.model))}

    def _pruning(self, round):
        """What to prune with after `round`: `pruning`, its rates divided among substeps, or falling."""

        def part(rate):
            return 1 - (1 - rate / (round + 1 if self.rule.decays else 1)) ** (1 / self.rule.substeps)

        rates = {name: part(rate) for name, rate in self.pruning.get("rates", {}).items()}
        given = {"rate": part(self.pruning["rate"])} if "rate" in self.pruning else {}
        if self.rule.units:
            whole = [name for name, rate in rates.items() if not rate]
            return {"rate": max([*given.values(), *rates.values()]), "exclude": whole, "score": self.pruning["score"]}
        return self.pruning | given | ({"rates": rates} if rates else {})


def merged(masks: Masks, kept: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> Masks:
    """A snapshot with the values of `kept` but those of `pruned` where masks prune."""
    masks = {f"{name}.weight": mask for name, mask in masks.items()}
    return {name: torch.where(masks[name], v, pruned[name]) if name in masks else v for name, v in kept.items()}


def frozen_weights(model: nn.Module) -> Masks:
    """The values that pruned weights are frozen at, by name; those at zero left out."""
    return {w.name: w.frozen.clone() for w in masked_weights(model) if w.frozen is not None}


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
        take_round(chains, train, round, rounds, record)


def take_round(chains: list[Chain], train, round: int, rounds: int, record) -> None:
    """Train the chains that are ready for `round`, those that are alike once, and prune them; see `search`."""
    if round == 0:
        for chain in chains:
            chain.begin(rounds)
    ready: dict[tuple, list[Chain]] = {}
    for chain in chains:
        if chain.is_ready(round):
            ready.setdefault(chain.alike(round), []).append(chain)
    results = train([alike[0].prepare(round) for alike in ready.values()]) if ready else []
    for (first, *others), result in zip(ready.values(), results, strict=True):
        final = snapshot(first.model) if others or first.compares else {}
        for chain in others:
            chain.prepare(round)
            rewind_(chain.model, final)
        result.final = final
        for chain in (first, *others):
            kept = {w.name: [int(w.mask.count_nonzero()), w.mask.numel()] for w in masked_weights(chain.model)}
            chain.finished[round] = {"density": density(chain.model), "kept": kept}
            chain.advance(round, result, rounds)
        for chain in (*others, first):  # in whose folder the training is, so that it can be done again for the others
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
