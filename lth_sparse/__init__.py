"""Sparse training for the Lottery Ticket Hypothesis: masked layers, pruning, rewinding, and the paper's experiments."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").exists():  # source checkout: kernels/ lies beside this package
    __path__.append(str(Path(__file__).parents[1]))

from . import optim
from .actions import reinit_, rewind_, snapshot
from .checkpoint import load_, save
from .convert import densify_, density, sparsify_, summary
from .lottery import find_ticket
from .masks import sync_
from .packing import pack_, unpack_
from .prune import prune_

__version__ = "0.1.0"
__all__ = [
    "densify_",
    "density",
    "find_ticket",
    "load_",
    "optim",
    "pack_",
    "prune_",
    "reinit_",
    "rewind_",
    "save",
    "snapshot",
    "sparsify_",
    "summary",
    "sync_",
    "unpack_",
]
