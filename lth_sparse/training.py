"""The engine: `train(tickets) -> results`. Every ticket by itself, on the device, resumable in the middle."""

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .actions import rewind_, snapshot
from .checkpoint import read_tensors, write_tensors
from .data import Data, Split
from .recipe import Recipe

SAVE_SECONDS = 30.0  # at most this much training is lost to a kill; saving a LeNet takes 10 ms


@dataclass
class Ticket:
    """A masked model at its starting values, trained in place.

    `seed` decides the order of the data; `start` is the iteration that the values belong to; `keep_at` an iteration
    whose values the result shall bring; `folder`, if any, holds the state of an interrupted training.
    """

    model: nn.Module
    label: str
    seed: int
    start: int = 0
    keep_at: int | None = None
    folder: Path | None = None


@dataclass
class Result:
    """What training a ticket gave; the ticket's model holds the final weights.

    `history` has one dict per evaluation: iteration, train_loss (mean since the last one), validation_loss,
    validation_accuracy, test_loss, test_accuracy (fractions). `best` are the values of lowest validation loss,
    `kept` those of iteration `keep_at`. `status` is "done" or "diverged"; `seconds` counts earlier sittings too.
    `metrics` is what a user's own training returned instead.
    """

    history: list[dict] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    status: str = "done"
    train_accuracy: float = float("nan")
    seconds: float = 0.0
    metrics: object = None

    @property
    def early_stop(self) -> dict:
        """The evaluation of lowest validation loss (paper, section 2), the first of equals."""
        return min(self.history, key=lambda row: (math.isnan(row["validation_loss"]), row["validation_loss"]))


def train(
    tickets: list[Ticket],
    data: Data,
    recipe: Recipe,
    on_metrics: Callable[[str, dict], None] = lambda label, row: None,
) -> list[Result]:
    """Train every ticket from its `start` to `recipe.iterations`; results in the order of the tickets.

    Each ticket's bits depend on the recipe and its own seed alone, not on the others. On the CPU tickets run in
    threads side by side: two of LeNet's on two cores take 0.94 ms per step, one after the other 1.2 ms (torch 2.15).
    When one fails, or the caller is interrupted, the others save their state first.

    Args:
        recipe: resolved.
        on_metrics: called with a ticket's label and each row of its history, from the thread that trains it.
    """
    side_by_side = 2 * (os.cpu_count() or 1) if recipe.device == "cpu" else 1
    if recipe.device == "cuda":
        torch.set_float32_matmul_precision("high" if recipe.precision == "tf32" else "highest")
    threads, halt = torch.get_num_threads(), threading.Event()
    with ThreadPoolExecutor(max_workers=max(1, min(len(tickets), side_by_side))) as pool:
        try:
            futures = [pool.submit(_Training(ticket, data, recipe).run, on_metrics, halt) for ticket in tickets]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            halt.set()
    torch.set_num_threads(threads)
    failures = [future.exception() for future in futures if future.exception()]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, _Halted)):
        raise failure  # the one that halted the others
    return [future.result() for future in futures]


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what this process frees; before it starts threads. Elsewhere nothing happens.

    Memory returned to the system is paged in anew when it is next wanted. Kept, 1,000 images pass conv-2 in 0.74 s
    instead of 1.42, and a step of a Linear 4096 x 4096 takes 43 ms instead of 67 (two threads, torch 2.15).
    """
    arenas, mapped_from, trimmed_from = -8, -3, -1  # M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for option, value in ((arenas, 1), (mapped_from, 2**30), (trimmed_from, 2**31 - 1)) if mallopt else ():
        mallopt(option, value)


class _Halted(Exception):
    """Training was asked to stop; its state is saved."""


class _Training:
    """One ticket on its way: everything that must be saved to go on to the same bits."""

    def __init__(self, ticket: Ticket, data: Data, recipe: Recipe):
        self.ticket, self.data, self.recipe = ticket, data, recipe
        self.model = ticket.model.to(recipe.device)
        self.optimizer = make_optimizer(self.model, recipe)
        self.iteration, self.result = ticket.start, Result()
        self.loss = torch.zeros((), device=recipe.device)  # summed since the last evaluation
        self.order = _Order(len(data.train.labels), recipe.batch_size, ticket.seed, recipe.device)

    def run(self, on_metrics, halt) -> Result:
        torch.set_num_threads(self.recipe.threads)
        # Adam's moments of inputs that are always zero decay into denormals, which are 10 to 100 times slower.
        torch.set_flush_denormal(True)
        self._resume(on_metrics)
        self.model.train()
        begin, saved = time.monotonic() - self.result.seconds, time.monotonic()
        while self.iteration < self.recipe.iterations and self.result.status == "done":
            self._step()
            if self.iteration % self.recipe.evaluate_every == 0 or self.iteration == self.recipe.iterations:
                self._evaluate(on_metrics)
            if halt.is_set() or time.monotonic() - saved > SAVE_SECONDS:
                self.result.seconds, saved = time.monotonic() - begin, time.monotonic()
                self._save()
            if halt.is_set():
                raise _Halted
        _, self.result.train_accuracy = evaluate(self.model, self.data.train, self.recipe)
        self.result.seconds = time.monotonic() - begin
        return self.result

    def _step(self):
        if self.iteration == self.ticket.keep_at:
            self.result.kept = snapshot(self.model)
        index = self.order.batch(self.iteration)
        images, labels = self.data.train.images[index], self.data.train.labels[index]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.iteration)
        with _precision(self.recipe):
            loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss += loss.detach()
        self.iteration += 1

    def _evaluate(self, on_metrics):
        since = self.result.history[-1]["iteration"] if self.result.history else self.ticket.start
        row = {"iteration": self.iteration, "train_loss": float(self.loss) / (self.iteration - since)}
        self.loss.zero_()
        for name in ("validation", "test"):
            loss, accuracy = evaluate(self.model, getattr(self.data, name), self.recipe)
            row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        self.result.history.append(row)
        if not _is_finite(row):
            self.result.status = "diverged"
        elif self.result.early_stop is row:
            self.result.best = snapshot(self.model)
        on_metrics(self.ticket.label, row)

    def _save(self):
        if self.ticket.folder is None:
            return
        groups = {"model": snapshot(self.model), "best": self.result.best, "kept": self.result.kept}
        for index, state in self.optimizer.state_dict()["state"].items():
            groups[f"optimizer.{index}"] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        tensors = {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}
        progress = {"iteration": self.iteration, "history": self.result.history, "seconds": self.result.seconds}
        tensors["loss"] = self.loss
        write_tensors(self._file, tensors, progress)

    def _resume(self, on_metrics):
        if self.ticket.folder is None or not self._file.exists():
            return
        tensors, progress = read_tensors(self._file)
        groups: dict[str, dict[str, Tensor]] = {"best": {}, "kept": {}}
        self.loss.copy_(tensors.pop("loss"))
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor.clone()  # aligned again: read tensors lie where they lay
        rewind_(self.model, groups["model"])
        state = self.optimizer.state_dict()
        state["state"] = {int(g.split(".")[1]): named for g, named in groups.items() if g.startswith("optimizer.")}
        self.optimizer.load_state_dict(state)
        self.iteration = progress["iteration"]
        self.result = Result(progress["history"], groups["best"], groups["kept"], seconds=progress["seconds"])
        for row in self.result.history[-1:]:
            self.result.status = "done" if _is_finite(row) else "diverged"
            on_metrics(self.ticket.label, row)

    @property
    def _file(self) -> Path:
        return self.ticket.folder / "training.safetensors"


class _Order:
    """Batch i is the images at places i*B to (i+1)*B of an endless row of seeded permutations, one per epoch.

    A function of the iteration alone, so nothing of it needs saving, and no image is left out of an epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, device: str):
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self.epochs: dict[int, Tensor] = {}

    def batch(self, iteration: int) -> Tensor:
        """Indices int64 [batch_size] of the images of this iteration."""
        first, last = iteration * self.batch_size, (iteration + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, place = divmod(first, self.size)
            part = self._epoch(epoch)[place : place + last - first]
            parts.append(part)
            first += len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch(self, epoch):
        if epoch not in self.epochs:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).to(self.device)
            self.epochs = {e: o for e, o in self.epochs.items() if e == epoch - 1} | {epoch: order}
        return self.epochs[epoch]


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """A fresh optimizer as the recipe says; one is made for every ticket."""
    decay = {"lr": recipe.lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=recipe.momentum, **decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), **decay)


def learning_rate(recipe: Recipe, iteration: int) -> float:
    """Linear warmup from 0, then a tenth at each milestone (paper, section 4 and appendix I)."""
    rate = recipe.lr * 0.1 ** sum(iteration >= milestone for milestone in recipe.milestones)
    return rate * min(1.0, (iteration + 1) / recipe.warmup) if recipe.warmup else rate


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, recipe: Recipe) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over `split`, in eval mode, with one transfer at the end; train mode after."""
    model.eval()
    # LeNet, 15,000 images, one core: 100 ms in batches of 1,000, 145 ms in one (torch 2.15); a GPU wants them large.
    batch = 1000 if recipe.device == "cpu" else 10_000
    sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
        with _precision(recipe):
            logits = model(images).float()
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([F.cross_entropy(logits, labels, reduction="sum"), correct]).double()
    model.train()
    loss, accuracy = (sums / len(split.labels)).tolist()
    return loss, accuracy


def _is_finite(row):
    return math.isfinite(row["train_loss"] + row["validation_loss"])


def _precision(recipe):
    return torch.autocast(recipe.device, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()
