"""Which rank is the slowest, and when that is worth a word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.train.stragglers import Straggler, StragglerDetector, find_slowest_rank


@given(st.lists(st.floats(0.001, 100.0), min_size=2, max_size=9))
def test_the_slowest_is_compared_with_the_median_of_the_others(seconds: list[float]) -> None:
    found = find_slowest_rank(seconds)
    assert found is not None
    others = sorted(seconds[: found.rank] + seconds[found.rank + 1 :])
    low, high = others[(len(others) - 1) // 2], others[len(others) // 2]
    assert seconds[found.rank] == max(seconds)
    assert found.ratio >= 1.0
    assert min(max(seconds) / low, max(seconds) / high) <= found.ratio * (1 + 1e-9)
    assert found.ratio <= max(max(seconds) / low, max(seconds) / high) * (1 + 1e-9)


def test_one_rank_alone_or_ranks_that_measured_nothing_have_no_slowest() -> None:
    assert find_slowest_rank([1.0]) is None
    assert find_slowest_rank([0.0, 0.0]) is None


def test_a_rank_is_named_once_when_it_stays_slow() -> None:
    pace = StragglerDetector()
    told = [pace.observe_step(Straggler(2, 2.0 + step % 2)) for step in range(40)]
    assert [index for index, each in enumerate(told) if each] == [17]
    assert told[17] == Straggler(2, 2.5)


def test_hiccups_and_small_differences_are_not_named() -> None:
    pace = StragglerDetector()
    assert not any(pace.observe_step(Straggler(step % 3, 9.0)) for step in range(100))
    assert not any(pace.observe_step(Straggler(1, 1.4)) for _ in range(100))
