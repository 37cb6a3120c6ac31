"""Run folders: where an experiment lives, who may write there, and files that are never half written.

runs/<recipe>--<identity>/recipe.json, environment.json
                         /<arm>/trial_0/round_03/ticket.safetensors   masks of the round, 1 bit per weight
                                                 /metrics.jsonl       one row per evaluation
                                                 /trained.safetensors values of lowest validation loss
                                                 /result.json         written last: the round is done
"""

import contextlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .checkpoint import write_bytes
from .measures import Energy
from .recipe import Recipe
from .recipes import Experiment

_FIRST = ("lock", "environment.json", "recipe.json")  # all that a folder holds whose making was interrupted


@contextlib.contextmanager
def opened(recipe: Recipe | Experiment, name: str, out: Path | None = None, **about):
    """Make or reopen the folder of a resolved recipe, for one writer at a time; yields its Path.

    `about` stands in recipe.json beside the settings, and may change from time to time.

    Raises:
        ValueError: the folder was made with other settings, or another process is writing there.
        OSError: it cannot be made.
    """
    import fcntl  # absent on Windows, where the rest of the library works

    folder = out or Path("runs") / f"{name}--{recipe.identity()}"
    wanted = {"name": name, "identity": recipe.identity(), "settings": plain(recipe.settings())}
    wanted |= plain(about)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the run folder {folder} is a file")
    if (folder / "recipe.json").exists():
        _refuse_other(folder, wanted["settings"])
    elif folder.exists() and any(entry.name.removesuffix(".part") not in _FIRST for entry in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not a run folder: name another with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}") from None
        if not (folder / "recipe.json").exists():
            write_json(folder / "environment.json", environment())
        if not (folder / "recipe.json").exists() or read_json(folder / "recipe.json") != wanted:
            write_json(folder / "recipe.json", wanted)
        yield folder


def round_folder(run: Path, arm: str, trial: int, round: int) -> Path:
    """`run`/arm/trial_0/round_03."""
    return run / arm / f"trial_{trial}" / f"round_{round:02d}"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by rename."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """Write JSON by rename; NaN becomes null, which JSON knows."""
    write_text(path, json.dumps(plain(content), indent=indent, allow_nan=False) + "\n")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line, by rename."""
    write_text(path, "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows))


def read_json(path: Path) -> dict:
    """A JSON object from a file of ours; ValueError that names a damaged one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no JSON object")
    return content


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl; ValueError that names a damaged one."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def _refuse_other(folder, wanted):
    found = read_json(folder / "recipe.json").get("settings", {})
    keys = dict.fromkeys([*wanted, *found])
    differ = [f"{key} {found.get(key)!r}, not {wanted.get(key)!r}" for key in keys if found.get(key) != wanted.get(key)]
    if differ:
        raise ValueError(f"{folder} was made with other settings ({'; '.join(differ)}): name another with --out")


def plain(value):
    """`value` with tuples as lists and floats that are not finite as None, as it comes back from JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not -float("inf") < value < float("inf") else value
