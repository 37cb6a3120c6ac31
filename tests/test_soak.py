"""A handful of the cases of soak.py: a kill, an interrupt, a full disk, and damage of a file at rest."""

import pytest
import soak

KINDS = ("SIGKILL", "SIGTERM", "full disk: write", "truncated file", "flipped bit", "report of a flipped bit")


def test_disturbances(tmp_path):
    """On the recipe that takes the least; soak.py itself takes all of them."""
    found = soak.Soak(tmp_path, seed=0)
    for kind in KINDS:
        found.disturb(kind, "learned")
    assert set(KINDS) < set(soak.KINDS) and sum(found.counts[kind, "stopped"] for kind in KINDS) >= 2
    assert soak.table(found.counts).splitlines()[-1].startswith(f"| all | {len(KINDS)} |")


def test_what_is_broken_is_noticed(tmp_path, monkeypatch):
    found = soak.Soak(tmp_path, seed=0)
    found._make_whole("learned")
    found.whole["learned"] = found.whole["learned"] | {"lock": b"other"}
    with pytest.raises(soak.Broken, match="other bytes in lock"):
        found.disturb("report of a flipped bit", "learned")
    monkeypatch.setattr(soak.cli, "main", lambda command: 3)
    with pytest.raises(soak.Broken, match="exit code 3"):
        found.disturb("SIGKILL", "learned")
