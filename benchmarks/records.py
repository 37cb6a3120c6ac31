"""What the suite measured, in long format: one value to a record, with all that it depends on, or why it is missing."""

import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from lth_sparse import __version__, runs

ROOT = Path(__file__).parents[1]


class Record(NamedTuple):
    """One value with its distribution-free 95% interval over `n` timings (paired ones, for a ratio), or none.

    `status` is "ok", or says what kept the value away: "wrong", "not runnable", "out of memory", "no GPU", "no Triton",
    "out of time", "interrupted", "failed"; `note` then says why in a sentence, and otherwise which strategy computed.
    """

    section: str = ""
    name: str = ""  # what was done: "linear step", "conv2d input gradient", "lenet-300-100 step"
    provider: str = ""
    shape: str = ""
    density: float | None = None
    precision: str = ""  # fp32; tf32; bf16 by autocast, with weights and moments in float32
    clock: str = ""  # call time or kernel time, and the state of the caches
    metric: str = ""
    unit: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    status: str = "ok"
    note: str = ""
    device: str = ""
    versions: str = ""
    commit: str = ""


def title(record: Record) -> str:
    """What a record is about, in a line."""
    density = "" if record.density is None else f"density {record.density:.1%}"
    return ", ".join(filter(None, (record.name, record.shape, record.precision, density)))


def write(path: Path, records: list[Record]) -> None:
    """One JSON object per line, by rename."""
    runs.write_rows(path, [record._asdict() for record in records])


def read(path: Path) -> list[Record]:
    """The records of a file; ValueError that names a damaged one."""
    try:
        return [Record(**row) for row in runs.read_rows(path)]
    except TypeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def origin(device: torch.device) -> dict[str, str]:
    """What every record says of the machine and the code: device, versions and commit ("" outside a checkout)."""
    found = runs.environment()
    cpu = f"{found['processor']}, {torch.get_num_threads()} threads"
    versions = {"lth-sparse": __version__, "torch": torch.__version__, "triton": found["packages"]["triton"]}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": ", ".join(f"{name} {version}" for name, version in {**versions, "python": found["python"]}.items()),
        "commit": _commit(),
    }


def _commit():
    if not (ROOT / ".git").exists():  # installed, perhaps below somebody else's checkout
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
