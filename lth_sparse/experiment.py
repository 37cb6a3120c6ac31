"""A recipe carried out in a run folder: every arm, trial and round, resumable at any moment."""

from collections.abc import Callable
from pathlib import Path

from . import checkpoint, data, models, report, runs, training
from .actions import rewind_
from .convert import sparsify_
from .lottery import ARMS, Chain, search
from .masks import get_masks, set_masks_
from .recipe import Recipe
from .training import Result


def run(
    recipe: Recipe,
    data_dir: str | Path = "datasets",
    out: Path | None = None,
    name: str | None = None,
    on_metrics: Callable[[str, dict], None] = lambda label, row: None,
    on_round: Callable[[dict], None] = lambda result: None,
) -> Path:
    """Run a recipe, or go on where an earlier call stopped; returns the run folder.

    Args:
        recipe: unresolved, as parsed.
        on_metrics: called with "arm/trial_0/round_03" and each evaluation, `of` in it being the last iteration.
        on_round: called with the content of each round's result.json, those of earlier calls included.

    Raises:
        ValueError: settings, data or a run folder that do not fit (see `runs.opened`, `data.load`).
        OSError: the folder cannot be written; finished rounds stay.
    """
    loaded = data.load(
        recipe.dataset, data_dir, recipe.normalization, recipe.validation_size, recipe.seed, recipe.device
    )
    recipe = recipe.resolve(len(loaded.train.labels))
    searched = chains(recipe, loaded)  # before there is a folder: not every network takes these images
    with runs.opened(recipe, name or recipe.name, out) as folder:
        for chain in searched:
            chain.folder = folder
            for result in _restore(chain):
                on_round(result)

        def record(chain, round, result):
            on_round(_record(chain, round, result, recipe))

        def train(tickets):
            return training.train(tickets, loaded, recipe, lambda label, row: on_metrics(label, {**row, "of": last}))

        last = recipe.iterations
        search(searched, train, recipe.rounds, record)
        _save_winner(searched, folder)
        runs.write_json(folder / "summary.json", report.summarize(folder))
    return folder


def chains(recipe: Recipe, loaded: data.Data) -> list[Chain]:
    """A chain for every arm and trial of a resolved recipe; those that take another's masks come last."""
    found: list[Chain] = []
    for trial in range(recipe.trials):
        leaders: dict[str, Chain] = {}
        for name in sorted(recipe.arms, key=lambda name: name != "ticket"):
            model = models.build(recipe.model, loaded.input_shape, loaded.classes, recipe.activation)
            sparsify_(model).to(recipe.device)
            pruning = _pruning(model, recipe) | {"score": ARMS[name].score or recipe.score}
            leader = leaders.get(ARMS[name].masks_of)
            leaders[name] = Chain(model, recipe.seed, name, trial, pruning, None, leader, recipe.rewind)
        found += [leaders[name] for name in recipe.arms]
    return sorted(found, key=lambda chain: chain.leader is not None)


def _pruning(model, recipe) -> dict:
    rates = models.pruning_rates(model, recipe.prune_rate_fc, recipe.prune_rate_conv)
    if recipe.scope == "layer":
        return {"rates": rates, "scope": "layer"}
    # One pool, one rate: that of the convolutions where any go, and layers with rate 0 stay whole.
    rate = next(own for own in rates.values() if own)
    return {"rate": rate, "scope": "global", "rates": {name: 0.0 for name, own in rates.items() if own == 0}}


def _record(chain, round, result: Result, recipe) -> dict:
    """Write the files of a finished round, result.json last."""
    folder = runs.round_folder(chain.folder, chain.arm, chain.trial, round)
    following = runs.round_folder(chain.folder, chain.arm, chain.trial, round + 1)
    if round + 1 in chain.masks and chain.leader is None:
        following.mkdir(parents=True, exist_ok=True)
        checkpoint.save(chain.model, following / "ticket.safetensors", values=False)
    if result.kept:
        checkpoint.write_tensors(folder.parent / "rewind.safetensors", result.kept, {})
    set_masks_(chain.model, chain.masks[round])
    checkpoint.save(chain.model, folder / "ticket.safetensors", values=False)
    if result.best:
        checkpoint.save(rewind_(chain.model, result.best), folder / "trained.safetensors")
    runs.write_rows(folder / "metrics.jsonl", result.history)
    content = {"arm": chain.arm, "trial": chain.trial, "round": round, "status": chain.status}
    content |= chain.finished[round] | {"precision": recipe.precision, "iterations": recipe.iterations}
    content |= {"early_stop": result.early_stop, "final": result.history[-1]}
    content |= {"train_accuracy": result.train_accuracy, "seconds": result.seconds}
    content |= result.how
    chain.finished[round] = content
    runs.write_json(folder / "result.json", content)
    _forget_state(folder)
    return content


def _forget_state(folder):
    """Delete the state of a training that is done, and what a kill left of writing it."""
    for path in folder.glob("training.safetensors*"):
        path.unlink()


def _restore(chain) -> list[dict]:
    """Read the finished rounds of a chain back from its folder."""
    results = []
    if chain.is_ready(0) and ARMS[chain.arm].rewinds:
        chain.prepare(0)  # starting values come back from the seed
    rewind = runs.round_folder(chain.folder, chain.arm, chain.trial, 0).parent / "rewind.safetensors"
    if rewind.exists():
        chain.start = checkpoint.read_tensors(rewind)[0]
    while (folder := runs.round_folder(chain.folder, chain.arm, chain.trial, len(results))).is_dir():
        if (folder / "ticket.safetensors").exists() or (folder / "result.json").exists():
            checkpoint.load_(chain.model, folder / "ticket.safetensors")
            chain.masks[len(results)] = get_masks(chain.model)
        if not (folder / "result.json").exists():
            break
        results.append(runs.read_json(folder / "result.json"))
        _forget_state(folder)
        chain.status = results[-1]["status"]
        chain.finished[len(results) - 1] = results[-1]
    return results


def _save_winner(chains, folder):
    """Write the winning ticket of trial 0: its masks, and the values it starts from."""
    winner = report.summarize(folder)["winning_ticket"]
    chain = next((chain for chain in chains if chain.arm == "ticket" and chain.trial == 0), None)
    if winner is None or chain is None:
        return
    set_masks_(chain.model, chain.masks[winner["round"]])
    checkpoint.save(rewind_(chain.model, chain.start), folder / "winning_ticket.safetensors")
