"""The tables of a run: every cell by hand, gaps where nothing ran, arms beside or below each other."""

import pytest
from rich.table import Table

from lth_sparse import tables


def spread(*values):
    values = [value for value in values if value is not None]
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def row(arm, round, stops, tests, validations=(0.9,)):
    measures = {"early_stop_iteration": stops, "test_accuracy": tests, "validation_accuracy": validations}
    found = {"arm": arm, "round": round, "density": 0.5**round, "n": len(tests)}
    return found | {name: spread(*values) for name, values in measures.items()}


def summary(rows, arms=("ticket", "random"), trials=1, **more):
    settings = {"model": "conv-2", "dataset": "cifar10", "arms": list(arms), "trials": trials}
    status = {"done": len(rows), "planned": len(rows), "ended_early": []}
    return {"settings": settings, "status": status, "rows": rows, "winning_ticket": None} | more


def cells(table):
    """The head and the rows of a table as text."""
    columns = [list(column.cells) for column in table.columns]
    return [column.header for column in table.columns], [list(line) for line in zip(*columns, strict=True)]


def shown(summaries, decided=()):
    parts = list(tables.of(summaries, decided))
    return [part for part in parts if isinstance(part, str)], [part for part in parts if isinstance(part, Table)]


def test_a_round_has_a_row_and_an_arm_two_columns():
    rows = [row("ticket", 0, [1500, 2500], [0.5, 0.6]), row("random", 1, [100, 100], [0.25, None])]
    rows.insert(1, row("ticket", 1, [1000, 1000], [None, None]))
    texts, (first, _) = shown({"": summary(rows, trials=2)})
    assert texts == ["conv-2 on cifar10, mean (min-max) of 2 trials, at the early stop"]
    head, lines = cells(first)
    assert head == ["round", "weights", "ticket\nstop at", "\ntest %", "random\nstop at", "\ntest %"]
    assert lines == [
        ["0", "100.0 %", "2,000 (1,500-2,500)", "55.00 (50.00-60.00)", "-", "-"],
        ["1", "50.0 %", "1,000 (1,000-1,000)", "-", "100 (100-100)", "25.00 (25.00-25.00)"],
    ]


@pytest.mark.parametrize("count, beside", [(tables.BESIDE, True), (tables.BESIDE + 1, False)])
def test_many_arms_are_rows(count, beside):
    arms = [f"arm{i}" for i in range(count)]
    rows = [row(arm, round, [10], [0.1 * i + 0.01 * round]) for i, arm in enumerate(arms) for round in range(2)]
    _, (first, _) = shown({"": summary(rows, arms)})
    head, lines = cells(first)
    if beside:
        assert len(head) == 2 + 2 * count and [line[0] for line in lines] == ["0", "1"]
    else:
        assert head == ["test % at weights", "100.0 %", "50.0 %"]
        assert lines == [[arm, f"{10 * i:.2f}", f"{10 * i + 1:.2f}"] for i, arm in enumerate(arms)]


@pytest.mark.parametrize("last, rounds", [(6, range(7)), (7, [0, 2, 4, 6, 7]), (20, [0, 3, 6, 9, 12, 15, 18, 20])])
def test_of_many_rounds_some_are_shown_and_the_last(last, rounds):
    arms = ["a", "b", "c", "d"]
    rows = [row(arm, round, [10], [0.9]) for arm in arms for round in range(last + 1)]
    _, (first, _) = shown({"": summary(rows, arms)})
    assert cells(first)[0][1:] == [f"{100 * 0.5**round:.1f} %" for round in rounds]


def test_an_arm_is_compared_with_its_own_dense_network():
    rows = [row("ticket", round, [10], [test], [validation]) for round, test, validation in DECLINE]
    rows += [row("random", 0, [10], [0.8], [0.8]), row("random", 1, [10], [0.7], [0.7])]
    _, (_, comparison) = shown({"": summary(rows)})
    head, lines = cells(comparison)
    assert head == ["arm", "dense %", "best %", "at", "holds to"]
    # the best test accuracy is in round 1, the last validation accuracy not below the dense one's in round 2
    assert lines == [
        ["ticket", "90.00", "95.00", "50.0 %", "25.0 %"],
        ["random", "80.00", "80.00", "100.0 %", "100.0 %"],
    ]


DECLINE = [(0, 0.9, 0.9), (1, 0.95, 0.85), (2, 0.9, 0.9), (3, 0.85, 0.8)]


def test_variants_stand_below_each_other_in_one_comparison():
    rows = [row("ticket", round, [10], [0.9]) for round in range(2)]
    diverged = [row("ticket", 0, [10], [None]), row("ticket", 1, [10], [0.9])]
    given = {
        "slow": summary(rows, ["ticket"]),
        "fast": summary(rows, ["ticket"]),
        "wild": summary(diverged, ["ticket"]),
    }
    texts, found = shown(given)
    assert [text.partition(":")[0] for text in texts] == ["slow", "fast", "wild"] and len(found) == 4
    head, lines = cells(found[-1])
    assert head[:2] == ["variant", "arm"] and [line[0] for line in lines] == ["slow", "fast"], "nothing to compare with"


def test_a_run_of_dense_networks_is_not_compared():
    texts, found = shown({"": summary([row("ticket", 0, [10], [0.9])], ["ticket"])})
    assert len(found) == 1 and len(texts) == 1


def test_what_ended_early_and_the_winner_are_told():
    winner = {"round": 1, "density": 0.5, "early_stop": {"test_accuracy": 0.91}, "dense": {"test_accuracy": 0.9}}
    status = {"done": 3, "planned": 6, "ended_early": ["random trial 0: diverged at round 1"]}
    rows = [row("ticket", 0, [10], [0.9])]
    texts, _ = shown({"": summary(rows, status=status, winning_ticket=winner)})
    assert texts == [
        "conv-2 on cifar10, 1 trial, at the early stop, 3 of 6 rounds done",
        "random trial 0: diverged at round 1",
        "winning ticket: round 1, 50.0% of the weights, test accuracy 91.00% (dense 90.00%)",
    ]


def test_verdicts_come_last_and_what_is_not_measured_in_a_sentence(monkeypatch):
    LN1, LN2, LN3 = (tables.claims.load()[name] for name in ("LN1", "LN2", "LN3"))
    lacking = [tables.claims.Verdict(claim, None, None, "not measured", "no round 7") for claim in (LN1, LN3)]
    measured = tables.claims.Verdict(LN2, 1.1, 2, "holds")
    monkeypatch.setattr(tables.claims, "score", lambda summaries, decided: [lacking[0], measured, lacking[1]])
    given = {"": summary([row("ticket", round, [10], [0.9]) for round in range(2)], ["ticket"])}
    texts, found = shown(given, ["LN1", "LN2", "LN3"])
    head, lines = cells(found[-1])
    assert head == list(tables.claims.HEAD) and [line[0] for line in lines] == ["LN2"]
    assert texts[-1] == "claims not measured: LN1 (no round 7), LN3 (no round 7)"
    monkeypatch.setattr(tables.claims, "score", lambda summaries, decided: [])
    assert len(shown(given)[1]) == len(found) - 1
