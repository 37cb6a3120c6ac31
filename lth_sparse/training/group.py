"""Tickets trained together from their start to the end: evaluated, saved, resumed to the same bits."""

import math
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..actions import check_same_entries, rewind_
from ..checkpoint import read_tensors, write_tensors
from ..data import Data
from ..recipe import Recipe
from ..runs import fits
from .augmentation import draw_moves
from .graph import STEPS, Steps
from .network import Network
from .optimizer import learning_rate
from .order import Order
from .stack import Stack
from .tickets import Result, Ticket, is_finite
from .turns import Turns

EVALUATED = ("iteration", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy")
_PROGRESS = {"labels": [str], "iteration": int, "seconds": (int, float), "histories": [[dict]]}
SAVE_SECONDS = 30.0  # at most this much training is lost to a kill; saving a LeNet takes 10 ms


class Halted(Exception):
    """Training was asked to stop; its state is saved."""


class Group:
    """Tickets on their way, all at the same iteration: everything that must be saved to go on to the same bits.

    `strategies` says by layer how the group is computed. The state lies in the folder of the last ticket, as that is
    the last to be recorded: until then a finished group can be told again.
    """

    def __init__(self, kind: type[Stack | Network], tickets: list[Ticket], data: Data, recipe: Recipe, strategies):
        self.tickets, self.data, self.recipe = tickets, data, recipe
        self.learner = kind([ticket.model for ticket in tickets], data, recipe, strategies)
        self.iteration, self.seconds = tickets[0].start, 0.0
        self.results = [Result() for _ in tickets]
        self.best: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}
        size = len(data.train.labels)
        self.orders = [Order(size, recipe.batch_size, ticket.seed, recipe.device) for ticket in tickets]
        self.learner.seed = tickets[0].seed
        self.steps = Steps(self.learner, recipe.device == "cuda")

    def run(self, on_metrics: Callable[[str, dict], None], halt: threading.Event, turns: Turns) -> list[Result]:
        """Train to `recipe.iterations`, or until every ticket has diverged; computes only in its turns."""
        self._resume(on_metrics)
        begin, saved = time.monotonic() - self.seconds, time.monotonic()
        while self.iteration < self.recipe.iterations and any(result.status == "done" for result in self.results):
            with turns.one():
                self._advance()
                if self.iteration % self.recipe.evaluate_every == 0 or self.iteration == self.recipe.iterations:
                    self._evaluate(on_metrics)
            self.seconds = time.monotonic() - begin
            if halt.is_set() or time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
            if halt.is_set():
                raise Halted
        with turns.one():
            return self._finish(begin)

    def _advance(self):
        """Take steps up to the next evaluation or iteration to keep, at most `STEPS`."""
        if self.iteration == self.tickets[0].keep_at:
            self.kept = _copies(self.learner.tensors())
        every, last, keep_at = self.recipe.evaluate_every, self.recipe.iterations, self.tickets[0].keep_at
        stops = [last, (self.iteration // every + 1) * every, *([keep_at] if (keep_at or 0) > self.iteration else [])]
        count = min(min(stops) - self.iteration, STEPS)
        iterations = range(self.iteration, self.iteration + count)
        indices = torch.stack([order.batches(self.iteration, count) for order in self.orders], 1)
        rates = [learning_rate(self.recipe, i, self.tickets[0].fine_tune) for i in iterations]
        self.learner.iteration = self.iteration
        self.steps.take(indices, self._moves(iterations), rates)
        self.iteration += count

    def _moves(self, iterations):
        if self.recipe.augmentation == "none":
            return None
        batch = self.recipe.batch_size
        drawn = [torch.stack([draw_moves(batch, ticket.seed ^ i) for ticket in self.tickets]) for i in iterations]
        return torch.stack(drawn).to(self.recipe.device)

    def _evaluate(self, on_metrics):
        evaluated = [result.history[-1]["iteration"] for result in self.results if result.history]
        since = max(evaluated, default=self.tickets[0].start)  # those of tickets that diverged lag behind
        train_loss = (self.learner.loss / (self.iteration - since)).tolist()
        self.learner.loss.zero_()
        found = [self.learner.evaluate(split).tolist() for split in (self.data.validation, self.data.test)]
        better = []
        for i, result in enumerate(self.results):
            if result.status != "done":
                continue
            row = {"iteration": self.iteration, "train_loss": train_loss[i]}
            for name, numbers in zip(("validation", "test"), found, strict=True):
                row |= {f"{name}_loss": numbers[i][0], f"{name}_accuracy": numbers[i][1]}
            if result.add(row):
                better.append(i)
            on_metrics(self.tickets[i].label, row)
        self._keep_best(better)

    def _keep_best(self, better):
        now = self.learner.tensors()
        if len(better) == len(self.tickets) or not self.best:
            self.best = _copies(now)
        elif better:
            for name, tensor in now.items():
                self.best[name][better] = tensor[better]

    def _finish(self, begin) -> list[Result]:
        if len(self.tickets) > 1:
            self._save()  # should only some of the tickets be recorded before a kill
        accuracies = self.learner.evaluate(self.data.train)[:, 1].tolist()
        self.seconds = time.monotonic() - begin
        how = {"group": len(self.tickets), "strategies": self.learner.strategies, "captured": self.steps.captured}
        for i, result in enumerate(self.results):
            result.train_accuracy, result.seconds, result.how = accuracies[i], self.seconds, how
            result.best = self.learner.dense(self.best, i) if any(map(is_finite, result.history)) else {}
            result.kept = self.learner.dense(self.kept, i) if self.kept else {}
        finals = [self.learner.dense(self.learner.tensors(), i) for i in range(len(self.tickets))]
        self.learner.finish()
        for ticket, final in zip(self.tickets, finals, strict=True):
            rewind_(ticket.model, final)
        return self.results

    def _save(self):
        if self._file is None:
            return
        groups = {"now": self.learner.tensors(), "best": self.best, "kept": self.kept}
        for index, state in self.learner.optimizer.state_dict()["state"].items():
            groups[f"optimizer.{index}"] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        progress = {"labels": [ticket.label for ticket in self.tickets], "iteration": self.iteration}
        progress |= {"histories": [result.history for result in self.results], "seconds": self.seconds}
        write_tensors(self._file, tensors | {"loss": self.learner.loss}, progress)

    def _resume(self, on_metrics):
        """Take up the state that was saved, of this group or of a finished one that this one is a part of."""
        if self._file is None or not self._file.exists():
            return
        tensors, progress = read_tensors(self._file)
        try:
            self._take_up(tensors, progress)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{self._file} is damaged: it is no state of this training") from error
        for ticket, result in zip(self.tickets, self.results, strict=True):
            for row in result.history[-1:]:
                on_metrics(ticket.label, row)

    def _take_up(self, tensors, progress):
        if not fits(progress, _PROGRESS):
            raise ValueError("progress has other entries")
        labels = [ticket.label for ticket in self.tickets]
        whole, finished = labels == progress["labels"], progress["iteration"] == self.recipe.iterations
        if not whole and not (finished and set(labels) < set(progress["labels"])):
            return
        rows = [progress["labels"].index(label) for label in labels]
        groups: dict[str, dict[str, Tensor]] = {"now": {}, "best": {}, "kept": {}}
        self.learner.loss.copy_(tensors.pop("loss")[rows])
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            # indexed, it is a copy, aligned again: read tensors lie where they lay
            groups.setdefault(group, {})[name] = tensor[rows] if group in ("now", "best", "kept") else tensor.clone()
        for name in ("now", *(name for name in ("best", "kept") if groups[name])):
            check_same_entries("the state", groups[name], self.learner.tensors())
        self.learner.load_(groups["now"])
        device = self.recipe.device
        self.best, self.kept = ({k: t.to(device) for k, t in groups[name].items()} for name in ("best", "kept"))
        if whole:
            state = self.learner.optimizer.state_dict()
            state["state"] = {int(g.split(".")[1]): named for g, named in groups.items() if g.startswith("optimizer.")}
            self.learner.optimizer.load_state_dict(state)
            _check_moments(self.learner.optimizer)
        self.iteration, self.seconds = progress["iteration"], progress["seconds"]
        if not self.tickets[0].start <= self.iteration <= self.recipe.iterations:
            raise ValueError(f"iteration {self.iteration} of {self.recipe.iterations}")
        self.results = [Result(progress["histories"][row]) for row in rows]
        for result in self.results:
            for row in result.history:
                [math.isfinite(row[name]) for name in EVALUATED]  # each is there, and a number
            if result.history and not is_finite(result.history[-1]):
                result.status = "diverged"

    @property
    def _file(self):
        folder = self.tickets[-1].folder
        return None if folder is None else folder / "training.safetensors"


def _check_moments(optimizer):
    """ValueError where the state of a parameter is not its own: fused kernels would read past the end of it."""
    for parameter, state in optimizer.state.items():
        names = ("momentum_buffer",) if len(state) == 1 else ("step", "exp_avg", "exp_avg_sq")
        wanted = {name: () if name == "step" else tuple(parameter.shape) for name in names}
        if {name: tuple(value.shape) for name, value in state.items()} != wanted:
            raise ValueError("the optimizer's state has other shapes")


def _copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}
