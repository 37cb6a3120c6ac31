"""The tables of a run, as rich prints them: its rows, its winning ticket, and the claims that it decides."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from . import claims

WIDE = 5  # arms at most beside each other; more are a row each


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
    if decided:
        yield _verdicts(summaries, decided)


def _rounds(summary) -> Table:
    """Early stop and test accuracy of each arm in each round."""
    arms = summary["settings"]["arms"]
    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    density = {round: rows[arm, round]["density"] for arm, round in reversed(rows)}
    short = len(arms) > WIDE  # then the accuracy alone
    table = Table("round", "weights", box=None)
    for arm in arms:
        for title in [f"{arm}\ntest %"] if short else [f"{arm}\nstop at", "\ntest %"]:
            table.add_column(title, justify="right")
    for round in sorted(density):
        cells = [cell for arm in arms for cell in _cells(rows.get((arm, round)))[short:]]
        table.add_row(str(round), f"{100 * density[round]:.1f} %", *cells)
    return table


def _comparison(summaries) -> Table:
    """What became of each arm: its best level, and how far it holds the accuracy of its dense network."""
    columns = ("arm", "n", "dense test %", "best test %", "at weights", "holds the dense accuracy down to")
    table = Table(*(["variant"] if "" not in summaries else []), *columns, box=None)
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
    return str(dense["n"]), *accuracies, *(f"{100 * row['density']:.1f} %" for row in (best, holding[-1]))


def _verdicts(summaries, decided) -> Table:
    table = Table("claim", "what", "paper", "measured", "tolerance", "n", "verdict", box=None)
    for cells in claims.rows(claims.score(summaries, decided)):
        table.add_row(*cells)
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
