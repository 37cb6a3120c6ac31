"""The tables of a run, as rich prints them: its rows, its winning ticket, and the claims that it decides."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from . import claims

BESIDE = 3  # arms at most as columns of their own; more are rows
ACROSS = 7  # rounds at most beside each other


def of(summaries: dict[str, dict], decided: Sequence[str]) -> Iterable[Table | str]:
    """What to print of the summaries of a run's variants (see `report.variants`): sentences and tables.

    Args:
        decided: ids of claims to score.
    """
    for name, summary in summaries.items():
        yield (f"{name}: " if name else "") + _title(summary)  # as a table's title it would wrap at the table's width
        yield _rounds(summary)
        yield from summary["status"]["ended_early"]
        if winner := summary["winning_ticket"]:
            accuracies = winner["early_stop"]["test_accuracy"], winner["dense"]["test_accuracy"]
            yield (
                f"winning ticket: round {winner['round']}, {winner['density']:.1%} of the weights, "
                "test accuracy {:.2%} (dense {:.2%})".format(*accuracies)
            )
    if any(row["round"] for summary in summaries.values() for row in summary["rows"]):
        yield _comparison(summaries)
    yield from _verdicts(summaries, decided)


def _rounds(summary) -> Table:
    """Early stop and test accuracy of each arm in each round."""
    arms = summary["settings"]["arms"]
    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    if len(arms) > BESIDE:
        return _arms(arms, rows)
    density = {round: rows[arm, round]["density"] for arm, round in reversed(rows)}
    table = _table("round", "weights")
    for arm in arms:
        table.add_column(f"{arm}\nstop at", justify="right")
        table.add_column("\ntest %", justify="right")
    for round in sorted(density):
        cells = [cell for arm in arms for cell in _cells(rows.get((arm, round)))]
        table.add_row(str(round), f"{100 * density[round]:.1f} %", *cells)
    return table


def _arms(arms, rows) -> Table:
    """Test accuracy of each arm, in as many rounds as fit, by the weights that the first arm has left then."""
    rounds = sorted({round for _, round in rows})
    step = -(-len(rounds) // ACROSS)
    shown = [round for round in rounds if round % step == 0 or round == rounds[-1]]
    table = _table("test % at weights")
    for round in shown:
        density = next(row["density"] for (_, r), row in rows.items() if r == round)
        table.add_column(f"{100 * density:.1f} %", justify="right")
    for arm in arms:
        table.add_row(arm, *(_cells(rows.get((arm, round)))[1] for round in shown))
    return table


def _comparison(summaries) -> Table:
    """What became of each arm: its best level, and how far it holds the accuracy of its dense network."""
    columns = ("arm", "dense %", "best %", "at", "holds to")
    table = _table(*(["variant"] if "" not in summaries else []), *columns)
    for name, summary in summaries.items():
        for arm in summary["settings"]["arms"]:
            rows = [row for row in summary["rows"] if row["arm"] == arm and row["test_accuracy"]["mean"] is not None]
            if rows and rows[0]["round"] == 0:
                table.add_row(*([name] if name else []), arm, *_standing(rows))
    return table


def _standing(rows) -> tuple[str, ...]:
    """The cells of an arm in the comparison; `rows` by round, the dense network first."""
    dense, best = rows[0], max(rows, key=lambda row: row["test_accuracy"]["mean"])
    level = dense["validation_accuracy"]["mean"]
    holding = [row for row in rows if row["validation_accuracy"]["mean"] >= level]
    accuracies = (f"{100 * row['test_accuracy']['mean']:.2f}" for row in (dense, best))
    return *accuracies, *(f"{100 * row['density']:.1f} %" for row in (best, holding[-1]))


def _verdicts(summaries, decided) -> Iterable[Table | str]:
    """A table of the claims that the run measures, and a sentence with the others."""
    found = claims.score(summaries, decided)
    measured = [verdict for verdict in found if verdict.verdict != "not measured"]
    if measured:
        table = Table(*claims.HEAD, box=None)
        for cells in claims.rows(measured):
            table.add_row(*cells)
        yield table
    if others := [f"{verdict.claim.id} ({verdict.reason})" for verdict in found if verdict not in measured]:
        yield f"claims not measured: {', '.join(others)}"


def _table(*columns) -> Table:
    """A table that rather runs over the edge than breaks a name or a number."""
    table = Table(box=None)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _title(summary):
    settings, status = summary["settings"], summary["status"]
    trials = "1 trial" if settings["trials"] == 1 else f"mean (min-max) of {settings['trials']} trials"
    done = "" if status["done"] == status["planned"] else f", {status['done']} of {status['planned']} rounds done"
    return f"{settings['model']} on {settings['dataset']}, {trials}, at the early stop{done}"


def _cells(row):
    if row is None:
        return "-", "-"
    stop = _spread(row["early_stop_iteration"], row["n"], "{:,.0f}", 1)
    return stop, _spread(row["test_accuracy"], row["n"], "{:.2f}", 100)


def _spread(measure, n, form, factor):
    if measure["mean"] is None:
        return "-"
    mean, low, high = (form.format(factor * measure[key]) for key in ("mean", "min", "max"))
    return mean if n == 1 else f"{mean} ({low}-{high})"
