"""Turns: never more at a time than there are, and nobody is forgotten."""

import threading
import time

import pytest

from lth_sparse.training.turns import Turns


@pytest.mark.parametrize("count, threads", [(1, 3), (2, 5), (3, 2)])
def test_everyone_has_as_many_turns_as_the_others(count, threads):
    turns, running, most, taken = Turns(count), [], [], [0] * threads
    enough = threading.Event()

    def work(me):
        while not enough.is_set():
            with turns.one():
                running.append(me)
                most.append(len(running))
                time.sleep(0.001)
                running.remove(me)
                taken[me] += 1
                if taken[me] == 30:
                    enough.set()

    workers = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
    assert max(most) == min(count, threads) and not running
    assert min(taken) >= 10, "whoever gives a turn back does not take it again before those that wait"


def test_a_turn_that_fails_is_given_back():
    turns = Turns(1)
    with pytest.raises(RuntimeError), turns.one():
        raise RuntimeError
    with turns.one():
        pass
    assert turns.free == 1 and not turns.waiting
