"""What a run takes from another: its tickets, its network without them, or what it has finished."""

import hashlib
import shutil
from pathlib import Path

from torch import Tensor

from . import checkpoint, report, runs
from .actions import check_same_entries, reinit_, snapshot
from .lottery import Chain, merged
from .masks import get_masks, set_masks_
from .recipe import Recipe

_FREE = ("arms", "trials", "rounds")  # settings that no bit of a chain's rounds depends on


def find(given: str, out: Path | None) -> Path:
    """The run folder of that path, or the variant of that name beside `out`; ValueError where it is none."""
    for folder in ([out.parent / given] if out else []) + [Path(given)]:
        if (folder / "recipe.json").is_file():
            return folder
    raise ValueError(f"{given!r} is no run folder, and no variant that ran before this one")


def take_tickets(chains: list[Chain], source: Path, recipe: Recipe) -> None:
    """Give the arm `ticket` the masks of all rounds, and the values to rewind to, of the run in `source`.

    Raises:
        ValueError: that run is of another model or seed, or has fewer rounds or trials.
    """
    _check_alike(source, recipe)
    for chain in (chain for chain in chains if chain.arm == "ticket"):
        drawn = snapshot(chain.draw_())
        for round in range(recipe.rounds + 1):
            folder = runs.round_folder(source, "ticket", chain.trial, round)
            if not (folder / "ticket.safetensors").is_file():
                raise ValueError(f"rounds must be at most {round - 1}, as {folder.parent} has no {folder.name}")
            checkpoint.load_(chain.model, folder / "ticket.safetensors")
            chain.masks[round] = get_masks(chain.model)
        chain.start = _stored(chain, source, "rewind")
        chain.initial, chain.taken = drawn if chain.start else None, True


def take_network_without(chains: list[Chain], source: Path, recipe: Recipe) -> None:
    """Start from the initial network of `source` with the values of its winning ticket drawn anew (lecode, idea 5).

    Of a run whose winner is the dense network the sparsest ticket is taken.

    Raises:
        ValueError: that run is of another model or seed, or has no ticket.
    """
    _check_alike(source, recipe)
    results = report.results(source)
    found = [result for result in results if result["arm"] == "ticket" and result["round"]]
    for chain in chains:
        rounds = [result["round"] for result in found if result["trial"] == chain.trial]
        if not rounds:
            raise ValueError(f"{source} has no ticket of trial {chain.trial}")
        winner = report.winner(results, chain.trial)
        round = winner["round"] if winner and winner["round"] else max(rounds)
        old = _stored(chain, source, "initial") or snapshot(chain.draw_())
        path = runs.round_folder(source, "ticket", chain.trial, round) / "ticket.safetensors"
        # of each ticket another draw: the next one taken away may have the same weights
        drawn = chain.generator(f"without {hashlib.sha256(path.read_bytes()).hexdigest()}", 0, own=False)
        fresh, dense = snapshot(reinit_(chain.model, drawn)), get_masks(chain.model)
        checkpoint.load_(chain.model, path)
        chain.initial = merged(get_masks(chain.model), fresh, old)
        set_masks_(chain.model, dense)


def sources(given: Path, variant: str, single: bool) -> list[Path]:
    """The run of that variant in the run folder `given`; or that itself where it has no variants, if `single`."""
    if (given / variant / "recipe.json").is_file():
        return [given / variant]
    return [given] if single and "variants" not in runs.read_recipe(given) else []


def take_finished(chains: list[Chain], source: Path, recipe: Recipe, folder: Path) -> None:
    """Copy the rounds that `source` has finished of these chains into the run `folder`, where it has none yet.

    Raises:
        ValueError: the settings of `source` differ in more than arms, trials and rounds.
    """
    theirs = runs.read_recipe(source)["settings"]
    mine = runs.plain(recipe.settings())
    free = set(_FREE) - ({"rounds"} if recipe.final_density else set())  # there the rates follow from the rounds
    differ = [key for key in {**theirs, **mine} if key not in free and theirs.get(key) != mine.get(key)]
    if differ:
        raise ValueError(f"{source} cannot be gone on from: it was made with another {', '.join(differ)}")
    for chain in chains:
        given, ours = (runs.round_folder(run, chain.arm, chain.trial, 0).parent for run in (source, folder))
        rounds = sorted(given.glob("round_*"))[: recipe.rounds + 1]
        masks = [path / "ticket.safetensors" for path in rounds if (path / "ticket.safetensors").exists()]
        done = [path for path in rounds if (path / "result.json").exists()]
        if len(masks) <= recipe.rounds:  # the last one of a run is not pruned: it is trained again for that
            done = done[: len(masks) - 1] if chain.rule.prunes == "each" else []
        if not done or ours.exists():
            continue
        part = ours.with_name(f"part_{chain.trial}")
        shutil.rmtree(part, ignore_errors=True)
        for path in done:
            shutil.copytree(path, part / path.name)
        for path in (*given.glob("*.safetensors"), *masks[len(done) :]):
            target = part / path.relative_to(given)
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        part.rename(ours)


def _check_alike(source, recipe):
    found = runs.read_recipe(source)["settings"]
    for name in ("model", "seed"):
        if found.get(name) != getattr(recipe, name):
            raise ValueError(f"{source} must have {name} {getattr(recipe, name)!r}, got {found.get(name)!r}")


def read_values(path: Path, chain: Chain) -> dict[str, Tensor]:
    """Values of all tensors of a chain's model, from a file; ValueError where they are another model's."""
    values, _ = checkpoint.read_tensors(path)
    check_same_entries(str(path), values, snapshot(chain.model))
    return values


def _stored(chain, source, name):
    path = runs.round_folder(source, "ticket", chain.trial, 0).parent / f"{name}.safetensors"
    return read_values(path, chain) if path.exists() else None
