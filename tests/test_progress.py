"""Progress: a line per round without a terminal, bars with one, and nothing when it shall be quiet."""

import io
import threading

import pytest
from rich.console import Console

from lth_sparse.progress import Progress
from lth_sparse.recipe import Recipe

RECIPE = Recipe(dataset="digits", rounds=1, arms=("ticket", "random"), trials=2, device="cpu")


def shown(quiet=False, terminal=False):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, highlight=False)
    return Progress(RECIPE, console, quiet), console.file


def result(arm="ticket", trial=1, round=1):
    early_stop = {"iteration": 1500, "test_accuracy": 0.9705}
    return {"arm": arm, "trial": trial, "round": round, "density": 0.514, "early_stop": early_stop, "seconds": 12.4}


def row(iteration=500):
    return {"iteration": iteration, "of": 2000, "test_accuracy": 0.5}


def test_without_a_terminal_a_line_per_round():
    progress, file = shown()
    with progress:
        progress.metrics("ticket/trial_1/round_01", row())
        assert not file.getvalue()
        progress.round(result())
    assert file.getvalue() == "ticket 1  round  1   51.4% of weights  stop at  1,500  test 97.05%  12 s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_is_silent(terminal):
    progress, file = shown(quiet=True, terminal=terminal)
    with progress:
        progress.metrics("ticket/trial_1/round_01", row())
        progress.round(result())
    assert not file.getvalue()


def test_a_terminal_sees_what_trains_now():
    progress, file = shown(terminal=True)
    with progress:
        progress.metrics("random/trial_0/round_01", row())
        progress.bars.refresh()
        text = file.getvalue()
        assert "random 0 round 1/1" in text and "iteration 500 of 2,000" in text and "test 50.00%" in text
        assert "all rounds" in text
        progress.round(result("random", 0, 1))
        assert not progress.lines


def test_the_whole_counts_rounds_and_parts_of_rounds():
    progress, _ = shown()
    with progress:
        task = progress.bars.tasks[0]
        assert (task.total, task.completed) == (8, 0)
        progress.metrics("ticket/trial_0/round_00", row())
        progress.metrics("ticket/trial_0/round_00", row(1000))
        progress.metrics("random/trial_1/round_00", row())
        assert task.completed == 0.75
        progress.round(result("ticket", 0, 0))
        progress.round(result("ticket", 1, 0))  # of an earlier call: nobody saw it train
        assert task.completed == 2.25
        progress.round(result("random", 1, 0))
        assert task.completed == 3


def test_the_bars_end_with_an_error():
    progress, _ = shown(terminal=True)
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert not progress.bars.live.is_started


def test_tickets_report_from_threads_of_their_own():
    progress, _ = shown()

    def report(trial):
        for iteration in range(0, 2001, 20):
            progress.metrics(f"ticket/trial_{trial}/round_00", row(iteration))

    with progress:
        threads = [threading.Thread(target=report, args=(trial,)) for trial in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(progress.lines) == 4 and progress.bars.tasks[0].completed == 4


def test_speed_counts_the_steps_of_this_sitting(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("lth_sparse.progress.time.monotonic", lambda: next(clock))
    progress, _ = shown(terminal=True)
    with progress:
        for arm, iterations in {"ticket": (500, 600), "random": (100, 1000)}.items():
            for iteration in iterations:
                progress.metrics(f"{arm}/trial_1/round_01", row(iteration))
        assert progress.bars.tasks[0].fields["speed"] == "25 steps/s", "100 + 900 steps in 40 seconds"
