"""Runs of a few seconds, and all that they write in a form that can be compared."""

import json

from lth_sparse.recipe import Recipe

TINY = dict(dataset="digits", rounds=2, iterations="12", evaluate_every="5", rewind="3", device="cpu", threads=1)


def tiny(**given) -> Recipe:
    return Recipe(**TINY | given)


def content(run) -> dict:
    """Every file of a run by its path: bytes, or JSON without seconds."""

    def timeless(value):
        if isinstance(value, list):
            return [timeless(item) for item in value]
        return {k: timeless(v) for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value

    def read(path):
        return timeless(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()

    return {str(path.relative_to(run)): read(path) for path in run.rglob("*") if path.is_file()}


def differing(a: dict, b: dict) -> list[str]:
    """The paths of what is not the same in two contents: a message that can be read, unlike their difference."""
    return sorted(path for path in {**a, **b} if a.get(path) != b.get(path))
