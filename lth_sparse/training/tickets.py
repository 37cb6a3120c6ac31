"""What the engine takes and gives: tickets, and what training them found."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn


@dataclass
class Ticket:
    """A masked model at its starting values, trained in place.

    `seed` decides the order of the data; `start` is the iteration that the values belong to; `keep_at` an iteration
    whose values the result shall bring; `folder`, if any, holds the state of an interrupted training; `fine_tune`
    trains at the schedule's last learning rate.
    """

    model: nn.Module
    label: str
    seed: int
    start: int = 0
    keep_at: int | None = None
    folder: Path | None = None
    fine_tune: bool = False


@dataclass
class Result:
    """What training a ticket gave; the ticket's model holds the final weights.

    `history` has one dict per evaluation: iteration, train_loss (mean since the last one), validation_loss,
    validation_accuracy, test_loss, test_accuracy (fractions). `best` are the values of lowest validation loss,
    `kept` those of iteration `keep_at`, `final` those of the last where the search needs them after it has pruned the
    model. `status` is "done" or "diverged"; `seconds` counts earlier sittings too, and
    is that of the whole group. `how` says how it was computed: `group`, the tickets trained together; `strategies`
    by layer; `captured`, whether in a CUDA graph, or why not. `metrics` is what a user's own training returned
    instead.
    """

    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)
    status: str = "done"
    train_accuracy: float = float("nan")
    seconds: float = 0.0
    how: dict = field(default_factory=dict)
    metrics: object = None

    @property
    def early_stop(self) -> dict:
        """The evaluation of lowest validation loss (paper, section 2), the first of equals."""
        return min(self.history, key=lambda row: (math.isnan(row["validation_loss"]), row["validation_loss"]))

    def add(self, row: dict) -> bool:
        """Take an evaluation into the history; whether it is the best so far. What is not finite ends the training."""
        self.history.append(row)
        if not is_finite(row):
            self.status = "diverged"
            return False
        return self.early_stop is row


def is_finite(row: dict) -> bool:
    """Whether an evaluation found losses that are numbers."""
    return math.isfinite(row["train_loss"] + row["validation_loss"])
