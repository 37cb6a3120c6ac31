"""What the runs of a recipe say, and whether they trained as the paper did.

Levels and accuracies are in percent, gains in percentage points; values are means over trials.
"""

from collections.abc import Mapping

from ..recipe import PAPER

_ROUNDED = 1.02  # claims print levels rounded: 3.5 for 3.543


class Missing(LookupError):
    """The runs cannot tell; the sentence says what they lack."""


class Evidence:
    """The runs of a recipe, and what was looked at in them.

    `trials`: the number behind each value read. `difference`: between a run and the paper, in words, "" for none.
    `ladder`: the levels by round, from 0, of the arm read last.
    """

    def __init__(self, summaries: Mapping[str, dict]):
        self.summaries = list(summaries.values())
        self.trials: list[int] = []
        self.difference = ""
        self.ladder: dict[int, float] = {}

    def runs(self, **wanted) -> list[dict]:
        """The runs with these settings; True stands for all but 0, False for 0 or a setting they do not have."""
        found = [s for s in self.summaries if all(_fits(s["settings"].get(k, 0), v) for k, v in wanted.items())]
        if not found:
            raise Missing(f"no run with {_listed(wanted)}")
        for summary in found:
            self.difference = self.difference or _difference(summary["settings"], wanted)
        return found

    def arm(self, name: str = "ticket", **wanted) -> "Rounds":
        """An arm of the one run with these settings."""
        found = self.runs(**wanted)
        found = [run for run in found if any(row["arm"] == name for row in run["rows"])] or found
        if len(found) > 1:
            raise Missing(f"{len(found)} runs with {_listed(wanted) or 'different settings'}")
        return Rounds(self, found[0], name)

    def beside(self, name: str, other: str = "ticket") -> tuple["Rounds", "Rounds"]:
        """An arm, and another one of the same run."""
        arm = self.arm(name)
        (run,) = [run for run in self.summaries if any(row["arm"] == name for row in run["rows"])]
        return arm, Rounds(self, run, other)

    def supermask(self, name: str, **wanted) -> float:
        """Test accuracy of an untrained network, the best of the runs with these settings."""
        found = [run for run in self.runs(**wanted) if name in run.get("supermasks", {})]
        if not found:
            raise Missing(f"no supermask {name} with {_listed(wanted)}")
        self.trials += [run["n"] for run in found]
        return max(100 * run["supermasks"][name]["mean"] for run in found)


class Rounds:
    """One arm of a run by round: `levels` are those from round 1, and round 0 is the dense network of the ticket."""

    def __init__(self, evidence: Evidence, summary: dict, name: str):
        arms: dict[str, dict[int, dict]] = {}
        for row in summary["rows"]:
            arms.setdefault(row["arm"], {})[row["round"]] = row
        if name not in arms:
            raise Missing(f"the run has no arm {name}")
        dense = arms.get("ticket", arms[name]).get(0)
        self.name, self.trials, self.rows = name, evidence.trials, arms[name] | ({0: dense} if dense else {})
        self.levels = {round: 100 * row["density"] for round, row in sorted(arms[name].items()) if round}
        self.curves = {int(round): curve for round, curve in summary.get("curves", {}).get(name, {}).items()}
        evidence.ladder = {0: 100.0} | self.levels

    def to(self, level: float) -> "Rounds":
        """The same arm, which must have been pruned that far."""
        last = min(self.levels.values(), default=100.0)
        if last > _ROUNDED * level:
            raise Missing(f"the arm {self.name} ends at {last:.3g} % of the weights, and {level:.3g} % are needed")
        return self

    def at(self, round: int, measure: str = "test_accuracy") -> float:
        row = self.rows.get(round, {})
        mean = row.get(measure, {}).get("mean")
        if mean is None:
            raise Missing(f"the arm {self.name} has no {measure.replace('_', ' ')} in round {round}")
        self.trials.append(row["n"])
        return 100 * mean if measure.endswith("accuracy") else mean

    def count(self, round: int) -> int:
        """How many weights are left."""
        if "weights" not in self.rows[round]:
            raise Missing("the summary does not count weights")
        return self.rows[round]["weights"]

    def stop(self, round: int) -> float:
        """The iteration of early stop."""
        return self.at(round, "early_stop_iteration")

    def gain(self, round: int, measure: str = "test_accuracy") -> float:
        """Percentage points above dense."""
        return self.at(round, measure) - self.at(0, measure)

    def final_gain(self, round: int) -> float:
        return self.gain(round, "final_test_accuracy")

    def speedup(self, round: int) -> float:
        """How many times sooner than dense it stops."""
        return self.stop(0) / self.stop(round)

    def within(self, low: float, high: float = 100.0) -> list[int]:
        """The rounds from 1 with a level in the interval, which the arm must have passed."""
        found = [round for round, level in self.to(low).levels.items() if low <= _ROUNDED * level and level <= high]
        if not found:
            raise Missing(f"the arm {self.name} has no level from {low:.3g} % to {high:.3g} % of the weights")
        return found

    def where(self, holds, low: float, high: float) -> dict[float, bool]:
        """Whether `holds(self, round)`, for each level in the interval."""
        return {self.levels[round]: holds(self, round) for round in self.within(low, high)}

    def near(self, level: float) -> int:
        """The round from 1 whose level is nearest, of an arm that was pruned about that far."""
        return nearest(self.to(1.1 * level).levels, level)

    def sparsest(self, measure: str = "test_accuracy", loss: float = 0.0) -> float:
        """The lowest level as accurate as dense, but for `loss` percentage points."""
        return min([100.0, *(level for r, level in self.levels.items() if self.gain(r, measure) >= -loss)])

    def best_until(self, round: int, iteration: int) -> float:
        """The highest test accuracy on the way to an iteration."""
        if round not in self.curves:
            raise Missing(f"no curve of the arm {self.name} in round {round} was given")
        curve = self.curves[round]
        points = zip(curve["iteration"], curve["test_accuracy"]["mean"], strict=True)
        reached = [100 * accuracy for at, accuracy in points if at <= iteration and accuracy is not None]
        if not reached:
            raise Missing(f"the curve of the arm {self.name} in round {round} has no point up to iteration {iteration}")
        self.trials.append(self.rows[round]["n"])
        return max(reached)


def nearest(levels: Mapping[int, float], level: float) -> int:
    """The round whose level is nearest."""
    return min(levels, key=lambda round: abs(levels[round] - level))


def _fits(value, wanted) -> bool:
    return bool(value) == wanted if isinstance(wanted, bool) else value == wanted


def _difference(settings, wanted) -> str:
    """The first setting of a run that is not the paper's, leaving aside what the claim itself is about."""
    paper = {"dataset": "mnist" if settings["model"].startswith("lenet") else "cifar10"}
    paper |= {"score": "magnitude", "rewind": 0}
    paper |= PAPER.get(settings["model"], PAPER["lenet-300-100"])  # other widths of it train alike
    for name, value in paper.items():
        given = settings.get(name, value)
        if name not in wanted and _plain(given) != _plain(value):
            return f"{name} is {_plain(given)}, in the paper {_plain(value)}"
    return ""


def _plain(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _listed(wanted) -> str:
    return ", ".join(("" if v else "no ") + k if isinstance(v, bool) else f"{k} {v}" for k, v in wanted.items())
