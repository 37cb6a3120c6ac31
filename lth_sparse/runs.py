"""Run folders: where an experiment lives, who may write there, and files that are never half written.

runs/<recipe>--<identity>/recipe.json, environment.json
                         /<arm>/trial_0/round_03/ticket.safetensors   masks of the round, 1 bit per weight
                                                 /metrics.jsonl       one row per evaluation
                                                 /trained.safetensors values of lowest validation loss
                                                 /final.safetensors   those at the end, where the score compares both
                                                 /result.json         written last: the round is done
                         /lock; with shards /<arm>/trial_0.lock       who writes there

Each file holds its checksum, metrics.jsonl excepted, whose own is the entry `metrics` of result.json.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .checkpoint import UNSEALED, checksum, read_bytes, read_tensors, write_bytes
from .measures import Energy
from .recipe import Recipe
from .recipes import Experiment, is_name

_SETTINGS = {"model": str, "dataset": str, "arms": [str], "rounds": int, "trials": int}
_ENORMOUS = 1e100  # no loss in float32 comes near, and means of such numbers are finite
_FIRST = ("lock", "common.lock", "environment.json", "recipe.json")  # before anything has run


@contextlib.contextmanager
def opened(
    recipe: Recipe | Experiment, name: str, out: Path | None = None, chains: Iterable[str] | None = None, **about
):
    """Make or reopen the folder of a resolved recipe, for one writer at a time; yields its Path.

    Several may write at a time when each names the `chains` it works on ("ticket/trial_0"), which are then its alone;
    what they write in common they write in `alone`. `about` stands in recipe.json beside the settings, and may change
    from time to time.

    Raises:
        ValueError: the folder was made with other settings, or another process is writing there.
        OSError: it cannot be made.
    """
    folder = out or Path("runs") / f"{name}--{recipe.identity()}"
    wanted = {"name": name, "identity": recipe.identity(), "settings": plain(recipe.settings())}
    with claimed(folder, wanted | plain(about), chains):
        yield folder


@contextlib.contextmanager
def claimed(folder: Path, wanted: dict, chains: Iterable[str] | None = None):
    """Make or reopen the run `folder` whose recipe.json holds `wanted`; see `opened`."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the run folder {folder} is a file")
    begun = (folder / "recipe.json").exists() or not folder.exists()
    if not begun and any(entry.name.removesuffix(".part") not in _FIRST for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run folder: name another with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        locks.enter_context(_locked(folder, "lock", shared=chains is not None))
        with alone(folder):
            found = read_json(folder / "recipe.json") if (folder / "recipe.json").exists() else None
            if found is None:
                store(folder / "environment.json", environment())
            elif found != wanted:
                refuse_other(folder, wanted["settings"], ": name another with --out")
            if found != wanted:
                store(folder / "recipe.json", wanted)
        for chain in chains or ():
            (folder / chain).parent.mkdir(exist_ok=True)
            locks.enter_context(_locked(folder, f"{chain}.lock"))
        yield


def alone(folder: Path):
    """Wait until no other process writes what those that share a run write in common, and keep them waiting."""
    return _locked(folder, "common.lock", waits=True)


@contextlib.contextmanager
def _locked(folder, name, shared=False, waits=False):
    import fcntl  # absent on Windows, where the rest of the library works

    if (folder / name).is_symlink():
        raise ValueError(f"{folder / name} is a link: a run folder holds files of its own")
    with (folder / name).open("w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        yield


def round_folder(run: Path, arm: str, trial: int, round: int) -> Path:
    """`run`/arm/trial_0/round_03."""
    return run / arm / f"trial_{trial}" / f"round_{round:02d}"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by rename."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write JSON by rename; NaN becomes null, which JSON knows."""
    write_text(path, json.dumps(plain(content), indent=indent, allow_nan=False) + "\n")


def store(path: Path, content: dict) -> None:
    """Write a JSON object with its checksum, which `read_json` takes away again."""
    write_json(path, {"checksum": UNSEALED, **content})


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write one JSON object per line, by rename; returns the checksum of the file."""
    text = "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)
    write_text(path, text)
    return checksum(text.encode())


def read_json(path: Path, wanted: object = dict) -> dict:
    """The JSON object in a file, without its checksum.

    Args:
        wanted: what it must look like (see `fits`).

    Raises:
        ValueError: the file is damaged, or does not hold that.
        FileNotFoundError: there is no such file.
    """
    (content,) = _parsed(path, [read_bytes(path)])
    if isinstance(content, dict):
        content.pop("checksum", None)
    if not isinstance(content, dict) or not fits(content, wanted):
        raise ValueError(f"{path} is damaged: it does not hold what such a file does")
    return content


def read_rows(path: Path, given: str | None = None, wanted: object = dict) -> list[dict]:
    """The rows of a metrics.jsonl, each like `wanted`, of the checksum `given`; errors as of `read_json`."""
    content = read_bytes(path)
    if given is not None and given != checksum(content):
        raise ValueError(f"{path} is damaged: it does not have the checksum that it was written with")
    rows = _parsed(path, content.splitlines())
    if not fits(rows, [wanted]):
        raise ValueError(f"{path} is damaged: it does not hold what such a file does")
    return rows


def verify(run: Path, chains: Iterable[str] | None = None) -> None:
    """Read all that the trials of a run hold, or those `chains`; ValueError that names the first damaged file."""
    chains = ["*/trial_*"] if chains is None else chains
    for path in (path for chain in chains for path in sorted(run.glob(f"{chain}/**/*"))):
        if path.suffix == ".safetensors" and path.name != "training.safetensors":  # that is read where it is needed
            read_tensors(path)
        found = read_json(path) if path.suffix == ".json" else {}
        if "metrics" in found:
            read_rows(path.with_name("metrics.jsonl"), found["metrics"])


def read_recipe(run: Path) -> dict:
    """The recipe.json of a run; in that of an experiment `variants` names the folders that its runs are in.

    Raises:
        ValueError: `run` is no run folder, or its recipe.json is damaged.
    """
    path = run / "recipe.json"
    if not path.is_file():
        raise ValueError(f"{run} is not a run folder: it has no recipe.json")
    found = {"claims": [], "settings": {}} | read_json(path, {"name": str})
    own = {"variants": [str], "settings": dict} if "variants" in found else {"settings": _SETTINGS}
    if not fits(found, {"claims": [str]} | own) or not all(map(is_name, found.get("variants", ()))):
        raise ValueError(f"{path} is damaged: it does not hold what such a file does")
    return found


def fits(value: object, wanted: object) -> bool:
    """Whether a value from JSON looks as wanted.

    `wanted` is a type, or a tuple of types; `[wanted]` are lists of it; `{name: wanted}` objects with at least these
    entries, `{str: wanted}` such with any names.
    """
    if isinstance(wanted, list):
        return isinstance(value, list) and all(fits(item, wanted[0]) for item in value)
    if not isinstance(wanted, dict):
        counts = not isinstance(value, (int, float)) or abs(value) < _ENORMOUS
        return isinstance(value, wanted) and counts and (wanted is bool or not isinstance(value, bool))
    if not isinstance(value, dict):
        return False
    if str in wanted:
        return all(fits(item, wanted[str]) for item in value.values())
    return all(name in value and fits(value[name], own) for name, own in wanted.items())


def _parsed(path, texts):
    try:
        return [json.loads(text.decode()) for text in texts]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def environment() -> dict:
    """Versions, processor and device that a result depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "energy": Energy.available(),
        "packages": {name: _version(name) for name in ("lth-sparse", "torch", "torchvision", "triton", "numpy")},
    }


def _processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def refuse_other(folder: Path, wanted: dict, advice: str = "") -> None:
    """Raise ValueError, which ends in `advice`, unless the run in `folder` has the settings wanted."""
    found = read_recipe(folder)["settings"]
    keys = dict.fromkeys([*wanted, *found])
    differ = [f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in keys if found.get(key) != wanted.get(key)]
    if differ:
        raise ValueError(f"{folder} was made with other settings ({'; '.join(differ)}){advice}")


def plain(value):
    """`value` with tuples as lists and floats that are not finite as None, as it comes back from JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
