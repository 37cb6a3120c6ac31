"""Published numbers against what runs measured: which claims hold.

The claims lie in experiments/paper_claims.json and, of the reports that some recipes follow, in seed_claims.json there;
both files explain their kinds and tags. `evidence` reads the runs, `measured` says how each claim is measured.
"""

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import NamedTuple

from .evidence import Evidence, Missing, nearest
from .measured import MEASURED

HEAD = ("claim", "what", "paper", "measured", "tolerance", "n", "verdict")
_FILES = ("paper_claims.json", "seed_claims.json")
_UNGATED = {"S": "from secondary sources", "D": "read off a figure"}  # by tag
_TESTS = {
    "abs": lambda measured, value, tol: abs(measured - value) <= tol,
    "lower": lambda measured, value, tol: measured >= value - tol,
    "upper": lambda measured, value, tol: measured <= value + tol,
}


class Claim(NamedTuple):
    """One published statement; `tol` is None where its kind has no tolerance."""

    id: str
    where: str
    setting: str
    metric: str
    value: float | list
    kind: str
    tol: float | None
    tag: str
    source: str
    note: str


class Verdict(NamedTuple):
    """What became of a claim: "holds", "fails", "reported" (decides nothing) or "not measured"; the last two say why.

    `measured` is a number, a list where the claim is about several, or None; of a claim about an interval of levels it
    is the list of those where it holds, and of one about a level that the run never comes to, None. `n` is the smallest
    number of trials behind it.
    """

    claim: Claim
    measured: float | list | None
    n: int | None
    verdict: str
    reason: str = ""


def load() -> dict[str, Claim]:
    """Every claim, by its id."""
    folder = files("lth_sparse.experiments")
    documents = [json.loads((folder / name).read_text(encoding="utf-8")) for name in _FILES]
    return {claim["id"]: Claim(**claim) for document in documents for claim in document["claims"]}


def score(summaries: Mapping[str, dict], ids: Iterable[str]) -> list[Verdict]:
    """Measure the claims `ids` in the runs of a recipe, and judge them.

    A claim finds its run by settings (model, learning rate, warmup, ...), whatever the variant is called. It is only
    reported where that run differs from the paper otherwise, in its iterations for one, and not measured where no run
    or several fit, or an arm or a round is missing.

    Args:
        summaries: what `report.summarize` returns, by variant. LN13 needs `weights`, the number kept, in their rows;
            S0-1 to S0-3 need `report.curves` of the run as `summary["curves"]`. ZH1 to ZH4 read another summary,
            {"settings": {"model", "dataset"}, "n": trials, "supermasks": {name: {"mean": fraction}}}, with the test
            accuracy of an untrained network at its best level; names: large-final-same-sign, the same + "-constant"
            (weights are signed constants), learned, learned-rescaled (learned with dynamic weight rescaling).

    Raises:
        ValueError: an unknown id.
    """
    claims, ids = load(), list(ids)
    for id in ids:
        if id not in claims:
            raise ValueError(f"unknown claim {id!r}: choose from {', '.join(claims)}")
    return [_verdict(claims[id], Evidence(summaries)) for id in ids]


def rows(verdicts: Iterable[Verdict]) -> list[tuple[str, ...]]:
    """A line of text per verdict, in the columns of `HEAD`."""
    return [
        (
            v.claim.id,
            f"{v.claim.setting}: {v.claim.metric}",
            _text(v.claim.value),
            _text(v.measured),
            _tolerance(v.claim),
            _text(v.n),
            f"{v.verdict}: {v.reason}" if v.reason else v.verdict,
        )
        for v in verdicts
    ]


def _verdict(claim, evidence):
    try:
        found = MEASURED[claim.id](evidence)
    except Missing as missing:
        return Verdict(claim, None, None, "not measured", str(missing))
    measured = [level for level, holds in found.items() if holds] if isinstance(found, dict) else found
    why = _UNGATED.get(claim.tag) or ("by its note" if "report-only" in claim.note else evidence.difference)
    verdict = "reported" if why else "holds" if _holds(claim, found, evidence.ladder) else "fails"
    return Verdict(claim, measured, min(evidence.trials), verdict, why)


def _holds(claim, found, ladder) -> bool:
    if found is None:
        return False
    if isinstance(found, dict):
        return all(found.values())
    if claim.kind == "rounds":
        return abs(nearest(ladder, found) - nearest(ladder, claim.value)) <= claim.tol
    measured = found if isinstance(found, list) else [found]
    if claim.kind == "interval":
        low, high = claim.value
        return all(low <= number <= high for number in measured)
    if "require > 0" in claim.note and min(measured) <= 0:
        return False
    values = claim.value if isinstance(claim.value, list) else [claim.value] * len(measured)
    return all(_TESTS[claim.kind](*pair, claim.tol) for pair in zip(measured, values, strict=True))


def _tolerance(claim) -> str:
    if claim.kind == "interval":
        return "all of it"
    if claim.kind in ("lower", "upper"):
        sign, far = (">=", claim.value - claim.tol) if claim.kind == "lower" else ("<=", claim.value + claim.tol)
        return f"{sign} {_text(far)}"
    return f"± {_text(claim.tol)}" + (" rounds" if claim.kind == "rounds" else "")


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return "-" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
