"""Live progress of a recipe on stderr: a bar for the whole, a line for each ticket in training."""

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .recipe import Recipe


class Progress:
    """Context manager with callbacks for `experiment.run`; without a live terminal it prints a line per round."""

    def __init__(self, recipe: Recipe, console: Console, quiet: bool, live: bool = True):
        self.recipe, self.console, self.quiet = recipe, console, quiet
        self.live = live and console.is_terminal and not quiet
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[speed]}"),
            console=console,
            disable=not self.live,
            transient=True,
            speed_estimate_period=300,
        )
        self.lines: dict[str, int] = {}
        self.fractions: dict[str, float] = {}  # label -> how much of its round is done
        self.reached: dict[str, int] = {}  # label -> its last iteration
        self.steps, self.began = 0, time.monotonic()
        self.lock = threading.Lock()  # tickets report from threads of their own

    def __enter__(self) -> "Progress":
        rounds = (self.recipe.rounds + 1) * len(self.recipe.arms) * self.recipe.trials
        self.whole = self.bars.add_task("all rounds", total=rounds, speed="")
        self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bars.stop()

    def metrics(self, label: str, row: dict) -> None:
        """Show an evaluation of the ticket `label`, "arm/trial_0/round_03"; `row["of"]` is its last iteration."""
        with self.lock:
            arm, trial, round = label.split("/")
            text = f"{arm} {trial[6:]} round {int(round[6:])}/{self.recipe.rounds}"
            text += f"  iteration {row['iteration']:,} of {row['of']:,}  test {row['test_accuracy']:.2%}"
            if label not in self.lines:
                self.lines[label] = self.bars.add_task(text, total=row["of"], speed="")
            self.bars.update(self.lines[label], description=text, completed=row["iteration"])
            self._count(label, row["iteration"] / row["of"])
            self.steps += row["iteration"] - self.reached.get(label, row["iteration"])  # those of earlier sittings not
            self.reached[label] = row["iteration"]
            speed = self.steps / (time.monotonic() - self.began)
            self.bars.update(self.whole, speed=f"{speed:,.0f} steps/s" if self.steps else "")

    def round(self, result: dict) -> None:
        """Count a finished round, the content of its result.json."""
        with self.lock:
            label = f"{result['arm']}/trial_{result['trial']}/round_{result['round']:02d}"
            if label in self.lines:
                self.bars.remove_task(self.lines.pop(label))
            self._count(label, 1.0)
            if not self.quiet:
                self.console.print(_line(result), soft_wrap=True)

    def _count(self, label, fraction):
        self.fractions[label] = fraction
        self.bars.update(self.whole, completed=sum(self.fractions.values()))


def _line(result):
    stop = result["early_stop"]
    return (
        f"{result['arm']} {result['trial']}  round {result['round']:>2}  {result['density']:6.1%} of weights  "
        f"stop at {stop['iteration']:>6,}  test {stop['test_accuracy']:.2%}  {result['seconds']:.0f} s"
    )
