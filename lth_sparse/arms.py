"""Arms: what becomes of the weights between two rounds; beside the papers' arms, every score and action is one."""

from collections.abc import Callable
from typing import NamedTuple

from . import masks
from .actions import KEPT, PRUNED
from .scores import SCORES


class Arm(NamedTuple):
    """How a chain of rounds goes from one to the next; what is not said is as the winning ticket does it.

    `kept` and `pruned` name the actions on the weights that stay and that go (`actions.KEPT`, `.PRUNED`); `score` says
    which go, the recipe's unless given. `masks_of` names arms whose masks of the same round are taken instead, several
    of them brought together by `combine`. Arms prune after each round; `prunes` "once": all at once after the dense
    one, "start": before any training, in `substeps` prunings for each round. `own_order`: the data come in an order of
    its own; other arms see them as the ticket does. All start from the ticket's initial values, unless they draw theirs
    anew. `fine_tunes`: at the last learning rate of the schedule. `decays`: the rate is divided by the round.
    `units`: whole units and channels go.
    """

    kept: str = "rewind"
    pruned: str = "zero"
    score: str | None = None
    masks_of: tuple[str, ...] = ()
    combine: Callable | None = None
    prunes: str = "each"
    substeps: int = 1
    own_order: bool = False
    fine_tunes: bool = False
    decays: bool = False
    units: bool = False

    @property
    def is_fresh(self) -> bool:
        """Whether every round starts from values drawn anew."""
        return self.kept == "reinit"

    @property
    def carries(self) -> bool:
        """Whether a round starts from what the last one left, so that its values must be stored."""
        return self.kept == "keep" or self.pruned != "zero"


_SEEDS = {  # Frankle & Carbin 2019: the ticket and its controls; figure 4: one-shot
    "ticket": Arm(),
    "reinit": Arm("reinit", masks_of=("ticket",), own_order=True),
    "reinit-chain": Arm("reinit", own_order=True),
    "random": Arm("reinit", score="random", own_order=True),
    "one-shot": Arm(prunes="once"),
    "one-shot-reinit": Arm("reinit", masks_of=("one-shot",), own_order=True),
}
_OTHERS = {
    "keep": Arm("keep", fine_tunes=True),  # Han et al. 2015
    "lr-rewind": Arm("keep"),  # Renda et al. 2020
    "snip-at-start": Arm(score="snip", prunes="start"),  # Lee et al. 2019
    "synflow-at-start": Arm(
        score="synflow", prunes="start", substeps=10
    ),  # Tanaka et al. 2020, in 100 prunings or more
    "twin": Arm(masks_of=("ticket",), own_order=True),  # Frankle et al. 2020: the same ticket, other noise of SGD
    "sibling": Arm(own_order=True),  # another ticket of the same initial network
    "union": Arm(masks_of=("ticket", "sibling"), combine=masks.union),
    "intersection": Arm(masks_of=("ticket", "sibling"), combine=masks.intersection),
    "units": Arm(units=True),
    "redraw": Arm(pruned="redraw", decays=True),
    "freeze-zero-toward-all": Arm("rewind-zero-toward", "freeze-zero-toward"),  # Zhou et al. 2019, section 4, variant 2
}
_FOLLOWING = [name for name in KEPT if name not in ("rewind", "keep", "reinit", "rewind-zero-toward")]
_SCORING = [name for name in SCORES if name not in ("magnitude", "large-final", "random")]

ARMS: dict[str, Arm] = (
    _SEEDS
    | _OTHERS
    | {name: Arm(name, masks_of=("ticket",)) for name in _FOLLOWING}
    | {name: Arm(pruned=name) for name in PRUNED if name not in ("zero", "redraw")}
    | {name: Arm(score=name) for name in _SCORING}
)
