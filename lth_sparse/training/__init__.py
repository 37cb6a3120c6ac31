"""The engine: `train(tickets) -> results`, the same for the IMP loop whatever the network and the device."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import torch

from ..data import Data
from ..recipe import Recipe
from .group import Group, Halted
from .memory import keep_freed_memory
from .planning import Plan, plans
from .stack import Stack
from .tickets import Result, Ticket
from .turns import Turns

__all__ = ["Result", "Ticket", "keep_freed_memory", "train"]


def train(
    tickets: list[Ticket],
    data: Data,
    recipe: Recipe,
    on_metrics: Callable[[str, dict], None] = lambda label, row: None,
) -> list[Result]:
    """Train every ticket from its `start` to `recipe.iterations`; results in the order of the tickets.

    On CUDA perceptrons of the same shapes train together, other tickets one by one, both in captured graphs. On the CPU
    each ticket has a thread, and its bits depend on the recipe and its own seed alone: three of LeNet's
    on two cores take 1.2 ms a step each, evaluations not counted (torch 2.15). When one fails, or the caller is
    interrupted, the others save their state first. A group that the device has no memory for is halved.

    Args:
        recipe: resolved.
        on_metrics: called with a ticket's label and each row of its history, from the thread that trains it.
    """
    threads = torch.get_num_threads()
    if recipe.device == "cuda":
        torch.set_float32_matmul_precision("high" if recipe.precision == "tf32" else "highest")
    torch.set_num_threads(recipe.threads)
    try:
        planned = plans(tickets, data, recipe)
        if recipe.device == "cpu" and any(plan.kind is Stack for plan in planned):
            data = data.scaled()  # 40 of the 1,670 us of a LeNet step on one core; on CUDA it would be bytes to read
        found = _side_by_side(planned, data, recipe, on_metrics)
    finally:
        torch.set_num_threads(threads)
    return [found[ticket.label] for ticket in tickets]


def _side_by_side(planned: list[Plan], data, recipe, on_metrics) -> dict[str, Result]:
    """Train groups in threads that take turns: on the CPU as many at a time as have cores, on CUDA one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # that torchrun started on this machine
    cores = max(1, (os.cpu_count() or 1) // processes // recipe.threads) if recipe.device == "cpu" else 1
    halt, turns, found = threading.Event(), Turns(cores), {}

    def work(plan):
        torch.set_num_threads(recipe.threads)
        # Adam's moments of inputs that are always zero decay into denormals, which are 10 to 100 times slower.
        torch.set_flush_denormal(True)
        for part, results in _halving(plan, data, recipe, on_metrics, halt, turns):
            found.update(zip([ticket.label for ticket in part.tickets], results, strict=True))

    with ThreadPoolExecutor(max_workers=max(1, min(len(planned), 4 * cores))) as pool:
        try:
            futures = [pool.submit(work, plan) for plan in planned]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            halt.set()
    failures = [future.exception() for future in futures if future.exception()]
    for failure in sorted(failures, key=lambda failure: isinstance(failure, Halted)):
        raise failure  # the one that halted the others
    return found


def _halving(plan: Plan, data, recipe, on_metrics, *turns):
    """The plan's results, or those of its halves in turn where the device has too little memory for the whole."""
    try:
        results = Group(plan.kind, plan.tickets, data, recipe, plan.strategies).run(on_metrics, *turns)
    except torch.OutOfMemoryError:
        if len(plan.tickets) == 1:
            raise
        results = None
    if results is not None:
        yield plan, results
        return
    torch.cuda.empty_cache()
    middle = len(plan.tickets) // 2
    for half in (plan.tickets[:middle], plan.tickets[middle:]):
        yield from _halving(plan._replace(tickets=half), data, recipe, on_metrics, *turns)
