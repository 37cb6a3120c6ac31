"""Sparse training for the Lottery Ticket Hypothesis: masked layers, pruning, rewinding, and the paper's experiments."""

from pathlib import Path

if not (Path(__file__).parent / "kernels").exists():  # source checkout: kernels/ lies beside this package
    __path__.append(str(Path(__file__).parents[1]))

from . import optim
from .actions import reinit_, rewind_, snapshot
from .checkpoint import load_, save
from .convert import densify_, density, from_torch_prune_, sparsify_, summary
from .distributed import broadcast_
from .lottery import find_ticket
from .masks import difference, freeze_, get_masks, intersection, set_masks_, sync_, union
from .packing import pack_, unpack_
from .prune import prune_, rate_to_reach
from .structured import prune_units_, remove_units_

__version__ = "0.1.0"
__all__ = [
    "broadcast_",
    "densify_",
    "density",
    "difference",
    "find_ticket",
    "freeze_",
    "from_torch_prune_",
    "get_masks",
    "intersection",
    "load_",
    "optim",
    "pack_",
    "prune_",
    "prune_units_",
    "rate_to_reach",
    "reinit_",
    "remove_units_",
    "rewind_",
    "save",
    "set_masks_",
    "snapshot",
    "sparsify_",
    "summary",
    "sync_",
    "union",
    "unpack_",
]
