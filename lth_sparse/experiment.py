"""Recipes carried out in run folders: every arm, trial and round, resumable at any moment."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import across, checkpoint, data, measures, models, observations, report, runs, training
from .actions import snapshot
from .arms import ARMS
from .convert import match, sparsify_
from .lottery import Chain, frozen_weights, search
from .masks import get_masks, set_masks_
from .prune import rate_to_reach
from .recipe import Recipe
from .recipes import Experiment
from .shards import Shard, share
from .training import Result

SAMPLES = 10  # of each class, for scores that look at data: 100 images, as Lee et al. 2019 take, and lecode


def run_all(
    asked: Experiment,
    data_dir: str | Path = "datasets",
    out: Path | None = None,
    variant: Callable[[str, Recipe], dict] = lambda name, recipe: {},
    reuse: Sequence[Path] = (),
    shard: Shard | None = None,
) -> Path:
    """Run every variant of an experiment, each in a folder of its own name in the run folder, which is returned.

    Args:
        variant: called before each variant; what it returns are the callbacks of `run`.
        reuse: see `run`; of a run with variants the one of the same name, if there is one. A run without variants is
            for an experiment of one.
        shard: of several processes that share the run, this one; its part may be nothing.

    Raises:
        ValueError, OSError: as `run`.
    """
    about = {"source": asked.source, "claims": asked.claims}
    mine = share(asked, shard) if shard else dict.fromkeys(asked.variants)
    if list(asked.variants) == [""]:
        recipe, only = asked.variants[""], mine.get("", [])
        return run(recipe, data_dir, out, asked.name, **variant("", recipe), reuse=reuse, only=only, **about)
    chains = () if shard else None
    with runs.opened(asked, asked.name, out, chains, variants=list(asked.variants), **about) as folder:
        for name, only in mine.items():
            recipe = asked.variants[name]
            taken = [source for given in reuse for source in across.sources(given, name, len(asked.variants) == 1)]
            run(recipe, data_dir, folder / name, name, **variant(name, recipe), reuse=taken, only=only)
        return folder


def run(
    recipe: Recipe,
    data_dir: str | Path = "datasets",
    out: Path | None = None,
    name: str | None = None,
    on_metrics: Callable[[str, dict], None] = lambda label, row: None,
    on_round: Callable[[dict], None] = lambda result: None,
    reuse: Sequence[Path] = (),
    only: list[tuple[str, int]] | None = None,
    **about,
) -> Path:
    """Run a recipe, or go on where an earlier call stopped; returns the run folder.

    Args:
        recipe: unresolved, as parsed.
        on_metrics: called with "arm/trial_0/round_03" and each evaluation, `of` in it being the last iteration.
        on_round: called with the content of each round's result.json, those of earlier calls included.
        reuse: runs of the same settings but for arms, trials and rounds, whose finished rounds are taken over; those of
            an arm and trial from the first that has any.
        only: the arms and trials to run, as (arm, trial), while other processes run others; all unless given.
        about: what recipe.json says beside the settings.

    Raises:
        ValueError: settings, data or a run folder that do not fit (see `runs.opened`, `data.load`).
        OSError: the folder cannot be written; finished rounds stay.
    """
    loaded = data.load(
        recipe.dataset,
        data_dir,
        recipe.normalization,
        recipe.validation_size,
        recipe.seed,
        recipe.device,
        images=recipe.images,
    )
    recipe = recipe.resolve(len(loaded.train.labels))
    searched = chains(recipe, loaded, only)  # before there is a folder: not every network takes these images
    if recipe.tickets_of:
        across.take_tickets(searched, across.find(recipe.tickets_of, out), recipe)
    if recipe.without:
        across.take_network_without(searched, across.find(recipe.without, out), recipe)
    mine = None if only is None else [f"{arm}/trial_{trial}" for arm, trial in only]
    with runs.opened(recipe, name or recipe.name, out, mine, **about) as folder:
        for source in reuse:
            across.take_finished(searched, source, recipe, folder)
        runs.verify(folder, mine)
        for chain in searched:
            chain.folder = folder
            for result in _restore(chain, recipe.rounds):
                on_round(result)

        def record(chain, round, result):
            on_round(_record(chain, round, result, recipe, loaded))

        def train(tickets):
            first = recipe.first_iterations if tickets[0].label.endswith("round_00") else 0
            changed = replace(recipe, iterations=first) if first else recipe
            before = observations.untrained(tickets, loaded) if recipe.untrained else {}

            def on_evaluation(label, row):
                on_metrics(label, {**row, "of": changed.iterations})

            with measures.Energy() as energy:
                results = training.train(tickets, loaded, changed, on_evaluation)
            for ticket, result in zip(tickets, results, strict=True):
                observed = {"iterations": changed.iterations}
                observed |= {"untrained_accuracy": before[ticket.label]} if before else {}
                observed |= {"joules": energy.joules / len(results)} if energy.joules is not None else {}
                result.how = result.how | observed  # a new dict: the tickets of a group share theirs
            return results

        search(searched, train, recipe.rounds, record)
        if recipe.learn_masks:
            trials = [trial for trial in range(recipe.trials) if only is None or (recipe.arms[0], trial) in only]
            observations.learn_masks(recipe, loaded, folder, trials, on_metrics)
        with runs.alone(folder):
            summary = report.summarize(folder)
            _save_winner(searched, folder, summary["winning_ticket"])
            runs.store(folder / "summary.json", summary)
    return folder


def chains(recipe: Recipe, loaded: data.Data, only: list[tuple[str, int]] | None = None) -> list[Chain]:
    """A chain for every arm and trial of a resolved recipe, or `only` some, that take others' masks after these."""
    found: list[Chain] = []
    batches = _samples(loaded)
    for trial in range(recipe.trials):
        made: dict[str, Chain] = {}
        arms = [name for name in recipe.arms if only is None or (name, trial) in only]
        for name in sorted(arms, key=lambda name: len(ARMS[name].masks_of)):
            model = models.build(recipe.model, loaded.input_shape, loaded.classes, recipe.activation, recipe.dropout)
            sparsify_(model).to(recipe.device)
            leaders = tuple(made[other] for other in ARMS[name].masks_of)
            given = _pruning(model, recipe) | {"score": ARMS[name].score or recipe.score}
            made[name] = Chain(
                model, recipe.seed, name, trial, given, leaders=leaders, rewind=recipe.rewind, batches=batches
            )
        found += [made[name] for name in arms]
    return sorted(found, key=lambda chain: len(chain.leaders))


def _samples(loaded) -> list:
    """One batch with the first images of each class, as the network takes them, and their labels."""
    labels = loaded.train.labels
    first = torch.cat([(labels == c).nonzero().flatten()[:SAMPLES] for c in range(loaded.classes)])
    return [(loaded.inputs(loaded.train.images[first]), labels[first])]


def _pruning(model, recipe) -> dict:
    rates = models.pruning_rates(model, recipe.prune_rate_fc, recipe.prune_rate_conv)
    if recipe.final_density:
        rate = rate_to_reach(recipe.final_density, recipe.rounds)
        rates = {name: rate if own else 0.0 for name, own in rates.items()}
    for pattern in recipe.exclude:
        rates |= dict.fromkeys(match(list(rates), pattern), 0.0)
    if not any(rates.values()):
        raise ValueError(f"nothing would be pruned: exclude names every layer, {', '.join(rates)}")
    if recipe.scope == "layer":
        return {"rates": rates, "scope": "layer"}
    # One pool, one rate: that of the convolutions where any go, and layers with rate 0 stay whole.
    rate = next(own for own in rates.values() if own)
    return {"rate": rate, "scope": recipe.scope, "rates": {name: 0.0 for name, own in rates.items() if own == 0}}


def _record(chain, round, result: Result, recipe, loaded) -> dict:
    """Write the files of a finished round, result.json last."""
    folder = runs.round_folder(chain.folder, chain.arm, chain.trial, round)
    for following in sorted(chain.masks):
        _write_ticket(chain, following)
    for name, values in {"rewind": result.kept, "initial": chain.initial}.items():
        if values and round == 0:
            checkpoint.write_tensors(folder.parent / f"{name}.safetensors", values, {})
    content = {"arm": chain.arm, "trial": chain.trial, "round": round, "status": chain.status}
    if result.best:
        checkpoint.save(chain.become(round, result.best), folder / "trained.safetensors")
        content |= observations.of_round(chain, round, result, loaded)
        if chain.compares:
            checkpoint.save(chain.become(round, result.final), folder / "final.safetensors")
    content |= chain.finished[round] | {"precision": recipe.precision}
    content |= {"early_stop": result.early_stop, "final": result.history[-1]}
    content |= {"train_accuracy": result.train_accuracy, "seconds": result.seconds}
    content |= result.how | {"metrics": runs.write_rows(folder / "metrics.jsonl", result.history)}
    chain.finished[round] = content
    runs.store(folder / "result.json", content)
    _forget_state(folder)
    return content


def _write_ticket(chain, round):
    """Write the masks of a round, with the values that it starts from where they do not follow from the seed."""
    path = runs.round_folder(chain.folder, chain.arm, chain.trial, round) / "ticket.safetensors"
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if round in chain.carried:
        checkpoint.save(chain.become(round, chain.carried[round][0]), path)
    else:
        set_masks_(chain.model, chain.masks[round])
        checkpoint.save(chain.model, path, values=False)


def _forget_state(folder):
    """Delete the state of a training that is done, how it was planned, and what a kill left of writing them."""
    for path in [*folder.glob("training.safetensors*"), *folder.glob("strategies.json*")]:
        path.unlink()


def _restore(chain, rounds) -> list[dict]:
    """Read the finished rounds of a chain, and the masks that were made, back from its folder."""
    results = []
    if chain.is_ready(0) and not chain.rule.is_fresh:
        chain.prepare(0)  # starting values come back from the seed
    trial = runs.round_folder(chain.folder, chain.arm, chain.trial, 0).parent
    if (trial / "rewind.safetensors").exists():
        chain.start = across.read_values(trial / "rewind.safetensors", chain)
    for round, folder in enumerate(sorted(trial.glob("round_*"))):
        if len(results) < round and not (results and chain.rule.prunes != "each"):
            break  # masks of a round whose end was not recorded are made again
        if (folder / "ticket.safetensors").exists() or (folder / "result.json").exists():
            checkpoint.load_(chain.model, folder / "ticket.safetensors")
            chain.masks[round] = get_masks(chain.model)
            if chain.rule.carries and round:
                chain.carried = {round: (snapshot(chain.model), frozen_weights(chain.model))}
        if len(results) == round and (folder / "result.json").exists():
            results.append(report.read_result(chain.folder, folder / "result.json", [chain.arm]))
            _forget_state(folder)
            chain.status = results[-1]["status"]
            chain.finished[round] = results[-1]
    following = len(results)
    goes_on = results and chain.status == "done" and following <= rounds and not chain.leaders
    if goes_on and following not in chain.masks:  # they are written before a round is recorded as done
        lacking = trial / f"round_{following:02d}" / "ticket.safetensors"
        raise ValueError(f"{lacking} is missing: without result.json of the round before it that one is trained again")
    return results


def _save_winner(chains, folder, winner):
    """Write the winning ticket of trial 0: its masks, and the values it starts from."""
    chain = next((chain for chain in chains if chain.arm == "ticket" and chain.trial == 0), None)
    if winner is None or chain is None:
        return
    checkpoint.save(chain.become(winner["round"], chain.start), folder / "winning_ticket.safetensors")
