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
    assert found == Ratio(51.0, 41.0, 61.0, 101)  # 2 P(Binomial(101, 1/2) <= 40) = 0.047
    assert str(found) == "51.00 (41.00 to 61.00)"


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_few_pairs_have_no_interval(n):
    found = ratio([float(i + 1) for i in range(n)], [1.0] * n)
    assert found.median == (n + 1) / 2
    assert (found.low, found.high) == ((None, None) if n < 6 else (1.0, 6.0))
    assert str(found) == (f"{found.median:.2f} (n = {n})" if n < 6 else "3.50 (1.00 to 6.00)")
