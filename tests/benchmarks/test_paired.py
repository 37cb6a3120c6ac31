"""Ratios of interleaved timings."""

import pytest
from lth_sparse.benchmarks.paired import Ratio, ratio, seconds


def test_steps_take_turns_and_warm_up_uncounted():
    calls = []
    rows = seconds([lambda: calls.append("a"), lambda: calls.append("b")], rounds=4, warmup=1)
    assert calls == ["a", "b"] * 5
    assert [len(row) for row in rows] == [4, 4] and all(second > 0 for row in rows for second in row)


def test_steps_in_a_row_are_averaged_after_one_that_is_not_counted():
    calls = []
    ((_, _),) = seconds([lambda: calls.append(1)], rounds=2, warmup=0, inner=10)
    assert len(calls) == 22


def test_the_interval_is_that_of_order_statistics():
    theirs = [float(i) for i in range(1, 102)]
    found = ratio(theirs, [1.0] * 101)
    assert found == Ratio(51.0, 42.0, 60.0, 101)
    assert str(found) == "51.00 (42.00 to 60.00)"


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_pairs_have_an_interval_inside_their_range(n):
    found = ratio([float(i + 1) for i in range(n)], [1.0] * n)
    assert 1 <= found.low <= found.median <= found.high <= n
