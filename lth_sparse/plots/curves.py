"""Lines against training iteration: which rounds are drawn, until when, and how."""

import math

import numpy as np

from .frame import PALETTE, percent, styles, with_bars

PAPER_PERCENT = (100, 51.3, 21.1, 7.0, 3.6, 1.9, 0.2)  # rounds 0, 3, 7, 12, 15, 18, 28 of LeNet


def filled(curves: dict) -> dict:
    """The curves in which there is something, those of the ticket first."""
    kept = {arm: {r: c for r, c in rounds.items() if c["density"] and c["iteration"]} for arm, rounds in curves.items()}
    return {arm: kept[arm] for arm in sorted(kept, key=lambda arm: arm != "ticket") if kept[arm]}


def nearest(rounds: dict) -> list[int]:
    """The rounds nearest to each of the paper's percentages."""
    percents = {r: 100 * curve["density"] for r, curve in sorted(rounds.items())}
    return [min(percents, key=lambda r: abs(math.log(percents[r] / wanted))) for wanted in PAPER_PERCENT]


def chosen(rounds: dict) -> list[int]:
    """The rounds to draw of one arm: those nearest to the paper's percentages, or all of five or fewer."""
    return sorted(rounds) if len(rounds) <= 5 else sorted(set(nearest(rounds)))


def lines_of(keys, quantities, summary, curves) -> list[dict]:
    """The `quantities` of each (arm, round), with what says how to draw them."""
    trials = {(row["arm"], row["round"]): row["n"] for row in summary["rows"]}
    return [
        {"arm": arm, "round": r, "n": trials.get((arm, r), 1)}
        | {key: curves[arm][r][key] for key in ("density", "iteration", *quantities)}
        for arm, r in keys
    ]


def span(keys, summary, curves) -> dict:
    """The last iteration of each (arm, round), and until when they are shown: 2.5 times the median early stop.

    That is about 15,000 of LeNet's 50,000 iterations, as in the paper.
    """
    stops = [row.get("early_stop_iteration") or {} for row in summary["rows"] if (row["arm"], row["round"]) in keys]
    stops = [stop["mean"] for stop in stops if stop.get("mean") and math.isfinite(stop["mean"])]
    last = max(curves[arm][r]["iteration"][-1] for arm, r in keys)
    return {"last": last, "shown_until": min(last, 2.5 * float(np.median(stops))) if stops else last}


def colours_of(lines) -> dict[int, str]:
    """A colour for each round."""
    return dict(zip((line["round"] for line in lines), PALETTE, strict=False))


def by_iteration(axes, lines, key, unit, data, colours):
    """A quantity of `lines`, `unit` times, against training iteration: colours by round, dashes by arm.

    Bars every ten evaluations. Returns what is shown, until `data` says so, and what of that is late.
    """
    shown, late, until = [], [], data["shown_until"]
    drawn = styles(line["arm"] for line in lines)
    for place, line in enumerate(lines):
        x = np.array(line["iteration"])
        style = {"color": colours[line["round"]], "ls": drawn[line["arm"]][2], "marker": "" if len(x) > 1 else "o"}
        style["label"] = f"{percent(100 * line['density'])}%" + f" {line['arm']}" * (len(drawn) > 1)
        several = [line["n"] > 1] * len(x)
        # the bars of each line start at another evaluation, or they would lie on one another
        values = with_bars(axes, x, line[key], unit, several, lw=1.1, errorevery=(place, 10), **style)
        shown += [row[x <= until] for row in values]
        late += [row[(until / 2 <= x) & (x <= until)] for row in values]
    part = f" (of {data['last']:,})" if until < data["last"] else ""
    axes.set(xlabel="training iteration" + part, xlim=(0, until))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return shown, late
