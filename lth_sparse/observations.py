"""What a run looks at beside the training: untrained tickets, learned masks, signs, dead units, barriers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import checkpoint, measures, models, runs, supermask
from .actions import snapshot
from .convert import sparsify_
from .data import Data, Split
from .lottery import Chain
from .masks import masked_weights
from .recipe import Recipe
from .training import Result, Ticket

LEARNED = {"learned": False, "learned-rescaled": True}  # with dynamic weight rescaling (Zhou et al. 2019, section 5)


def untrained(tickets: list[Ticket], data: Data) -> dict[str, float]:
    """Test accuracy of each ticket at the values it starts from, by label (Zhou et al. 2019, section 5)."""
    return {ticket.label: evaluate(ticket.model, data, data.test)[1] for ticket in tickets}


def of_round(chain: Chain, round: int, result: Result, data: Data) -> dict:
    """Sign changes and dead units by layer, at the early stop; of the arm `twin` how far it and the ticket lie apart.

    `zeros` is the share of the masked weights that are exactly zero then, kept ones too; pruned ones may be frozen.
    `barrier` is the rise of the validation error between the two at their early stops (Frankle et al. 2020).
    """
    model = chain.become(round, result.best)
    found = {"dead_units": measures.dead_units(model), "zeros": _zeros(model)}
    start = chain.leaders[0].start if chain.leaders else chain.start
    if start and chain.rule.kept in ("rewind", "keep"):  # others begin with other signs than these
        found["sign_changes"] = measures.sign_changes(start, result.best, chain.masks[round])
    path = runs.round_folder(chain.folder, "ticket", chain.trial, round) / "trained.safetensors"
    if chain.arm == "twin" and path.exists():  # the ticket was recorded before; what diverged at once has none
        other = snapshot(checkpoint.load_(model, path))
        validate = partial(evaluate, data=data, split=data.validation)
        found["barrier"] = measures.instability(measures.interpolate(model, other, result.best, validate))
    return found


def learn_masks(recipe: Recipe, data: Data, folder: Path, trials: list[int], on_metrics: Callable) -> None:
    """Learn a mask of the trials' initial networks, with rescaling and without; finished ones are left as they are."""
    for trial in trials:
        for name in LEARNED:
            path = runs.round_folder(folder, name, trial, 0)
            if not (path / "mask.json").exists():
                path.mkdir(parents=True, exist_ok=True)
                found = _learn_mask(recipe, data, name, trial, partial(on_metrics, f"{name}/trial_{trial}/round_00"))
                best = min(found.history, key=lambda row: row["validation_loss"])
                about = {"mask": name, "trial": trial, "of": recipe.learn_masks, **best}
                about["metrics"] = runs.write_rows(path / "metrics.jsonl", found.history)
                runs.store(path / "mask.json", about)


def _learn_mask(recipe, data, name, trial, on_metrics):
    model = models.build(recipe.model, data.input_shape, data.classes, recipe.activation)
    chain = Chain(sparsify_(model).to(recipe.device), recipe.seed, trial=trial)
    return supermask.learn(
        chain.draw_(),
        data,
        recipe.learn_masks,
        rescale=LEARNED[name],
        seed=chain.generator("masks", 0).initial_seed(),
        on_metrics=lambda row: on_metrics({**row, "of": recipe.learn_masks}),
    )


def _zeros(model):
    """Of all masked weights as the layers compute with them."""
    weights = masked_weights(model)
    used = [w.parameter if w.frozen is None else w.parameter + w.frozen for w in weights]
    return sum(int((values == 0).sum()) for values in used) / sum(values.numel() for values in used)


def evaluate(model, data: Data, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a model over `split`, in eval mode; its mode is as before after."""
    was = model.training
    found = data.evaluate(model.eval(), split)
    model.train(was)
    return found
