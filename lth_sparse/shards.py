"""Runs shared among processes that need not talk: each takes some of the arms and trials, and all end in one folder."""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from . import report, runs
from .arms import ARMS
from .observations import LEARNED
from .recipes import Experiment

Chains = dict[str, list[tuple[str, int]]]  # by variant, the (arm, trial) pairs to run


class Shard(NamedTuple):
    """One of `count` processes that share a run; `index` counts from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count}"


def parse(text: str) -> Shard:
    """The shard that "3/16" means; ValueError unless it is one of these."""
    parts = text.split("/")
    index, count = (int(part) if part.isdecimal() else 0 for part in parts) if len(parts) == 2 else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--shard takes one of 1/N to N/N, got {text!r}")
    return Shard(index, count)


def of_torchrun(environment: Mapping[str, str] = os.environ) -> Shard | None:
    """The shard of this rank where torchrun started several; None without it."""
    if "TORCHELASTIC_RUN_ID" not in environment or environment["WORLD_SIZE"] == "1":
        return None
    return Shard(int(environment["RANK"]) + 1, int(environment["WORLD_SIZE"]))


def take_device(environment: dict[str, str] = os.environ) -> None:
    """Leave this rank of torchrun one GPU to see, all being dealt in turn; to be called before CUDA is used.

    By the environment, as torch's own choice of a device is that of a thread, and tickets are trained in several.
    """
    if "LOCAL_RANK" in environment:
        seen = environment.get("CUDA_VISIBLE_DEVICES")
        devices = [str(n) for n in range(torch.cuda.device_count())] if seen is None else seen.split(",")
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = devices[int(environment["LOCAL_RANK"]) % len(devices)]


def share(asked: Experiment, shard: Shard) -> Chains:
    """What one shard has to run: of the variants that it has anything of, the arms and trials.

    What takes masks or networks from one another stays together; the largest of these parts are dealt out first, each
    to the shard that has least.
    """
    dealt: list[list[tuple[str, str, int]]] = [[] for _ in range(shard.count)]
    for part in sorted(_parts(asked), key=lambda part: -_rounds(asked, part)):
        min(dealt, key=lambda given: _rounds(asked, given)).extend(part)
    found: Chains = {}
    for variant, arm, trial in dealt[shard.index - 1]:
        found.setdefault(variant, []).append((arm, trial))
    return {variant: found[variant] for variant in asked.variants if variant in found}


def _parts(asked) -> list[list[tuple[str, str, int]]]:
    """All chains (variant, arm, trial), those that need one another in one list."""
    every = [
        (variant, arm, trial)
        for variant, recipe in asked.variants.items()
        for arm in recipe.arms
        for trial in range(recipe.trials)
    ]
    part_of = {chain: [chain] for chain in every}
    for chain in every:
        for needed in _needed(asked, *chain):
            if part_of.get(needed, part_of[chain]) is not part_of[chain]:
                joined = part_of[needed] + part_of[chain]
                part_of |= dict.fromkeys(joined, joined)
    return list({id(part): part for part in part_of.values()}.values())


def _needed(asked, variant, arm, trial) -> list[tuple[str, str, int]]:
    recipe = asked.variants[variant]
    sources = [other for other in (recipe.tickets_of, recipe.without) if other]
    return [(variant, other, trial) for other in ARMS[arm].masks_of] + [(other, "ticket", trial) for other in sources]


def _rounds(asked, part) -> int:
    return sum((asked.variants[variant].rounds or 20) + 1 for variant, _, _ in part)


def is_done(run: Path) -> bool:
    """Whether every arm and trial of a run, which may not have begun, has come to its end.

    Raises:
        ValueError: a file of the run is damaged.
    """
    if not (run / "recipe.json").is_file():
        return False
    settings = runs.read_recipe(run)["settings"]
    found, ended = Counter(), set()
    for result in report.results(run):
        chain = result["arm"], result["trial"]
        found[chain] += 1
        if result["status"] != "done" or result["round"] == settings["rounds"]:
            ended.add(chain)

    def is_over(arm, trial):
        leaders = ARMS[arm].masks_of  # where one of them ended early, so do those that take its masks
        led = bool(leaders) and found[arm, trial] == min(found[leader, trial] for leader in leaders)
        return (arm, trial) in ended or (led and all(is_over(leader, trial) for leader in leaders))

    learned = len(list(run.glob("learned*/trial_*/round_00/mask.json")))
    wanted = len(LEARNED) * settings["trials"] if settings.get("learn_masks") else 0
    return learned == wanted and all(is_over(arm, t) for arm in settings["arms"] for t in range(settings["trials"]))


def merge(sources: Sequence[Path], out: Path | None = None) -> Path:
    """Bring what shards have run in folders of their own together in one, which is returned.

    Of an arm and trial that is in several the longest is taken.

    Raises:
        ValueError: they are not of the same settings, a file in them is damaged, or `out` is another run's.
        OSError: `out` cannot be written; what was merged stays.
    """
    for source in sources:
        runs.refuse_other(source, runs.read_recipe(sources[0])["settings"])
        runs.verify(source)
    wanted = runs.read_json(sources[0] / "recipe.json")
    folder = out or Path("runs") / f"{wanted['name']}--{wanted['identity']}"
    sources = [source for source in sources if source.resolve() != folder.resolve()]
    with runs.claimed(folder, wanted):
        for source in sources:
            shutil.copy(source / "environment.json", folder)
            for trial in sorted(path for path in source.glob("*/trial_*") if path.is_dir()):
                _take(trial, folder / trial.relative_to(source))
            if (source / "winning_ticket.safetensors").exists():
                shutil.copy(source / "winning_ticket.safetensors", folder)
        for name in wanted.get("variants", ()):
            parts = [source / name for source in sources if (source / name / "recipe.json").is_file()]
            if parts:
                merge(parts, folder / name)
        if "variants" not in wanted:
            runs.store(folder / "summary.json", report.summarize(folder))
    return folder


def _take(trial, target):
    """Copy the folder of a trial to `target` unless as much is there."""
    given, there = (len(list(path.glob("round_*/*.json"))) for path in (trial, target))
    if given <= there:
        return
    part = target.with_name(f"part_{target.name}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(trial, part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
