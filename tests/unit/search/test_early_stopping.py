"""Steps at which trials are compared, and which trials continue."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config.search import SchedulerConfig
from llm_training_toolkit.search.early_stopping import compute_rung_steps, get_bracket, should_continue

ASHA = SchedulerConfig(name="asha", reduction_factor=4)


def test_rungs_by_default_are_a_sixteenth_a_quarter_and_the_whole() -> None:
    assert compute_rung_steps(ASHA, 64, 512) == (4, 16, 64)


def test_rungs_in_tokens_come_at_the_same_tokens_for_every_batch() -> None:
    scheduler = SchedulerConfig(name="asha", reduction_factor=4, grace_period_tokens=8192)
    assert compute_rung_steps(scheduler, 64, 2048) == (4, 16, 64)
    assert compute_rung_steps(scheduler, 128, 1024) == (8, 32, 128)


def test_rungs_of_the_median_are_evenly_spaced_and_none_has_one() -> None:
    assert compute_rung_steps(SchedulerConfig(name="median", grace_period_steps=5), 22, 1) == (5, 10, 15, 20, 22)
    assert compute_rung_steps(SchedulerConfig(name="fifo"), 22, 1) == (22,)


@given(
    name=st.sampled_from(["fifo", "asha", "median", "hyperband"]),
    factor=st.integers(2, 8),
    first=st.one_of(st.none(), st.integers(1, 5000)),
    steps=st.integers(1, 3000),
)
def test_rungs_grow_and_end_with_the_run(name: str, factor: int, first: int | None, steps: int) -> None:
    scheduler = SchedulerConfig.model_validate({"name": name, "reduction_factor": factor, "grace_period_steps": first})
    found = compute_rung_steps(scheduler, steps, 7)
    assert list(found) == sorted(set(found))
    assert found[-1] == steps
    assert found[0] >= 1


def test_asha_keeps_the_best_quarter_whatever_the_direction() -> None:
    others = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert should_continue(ASHA, "min", 1.5, others)
    assert not should_continue(ASHA, "min", 2.5, others)
    assert should_continue(ASHA, "max", 6.5, others)
    assert not should_continue(ASHA, "max", 5.5, others)


@given(values=st.lists(st.floats(0, 10), min_size=1, max_size=60), factor=st.integers(2, 5))
def test_the_best_trial_so_far_is_always_promoted_and_few_are(values: list[float], factor: int) -> None:
    scheduler = SchedulerConfig(name="asha", reduction_factor=factor)
    for count, value in enumerate(values):
        if value <= min(values[:count], default=math.inf):
            assert should_continue(scheduler, "min", value, values[:count])


def test_asha_on_trials_in_any_order_spends_a_third_of_the_grid() -> None:
    shares = []
    for seed in range(200):
        values = list(range(16))
        random.Random(seed).shuffle(values)
        spent, seen = 0.0, dict[int, list[float]]()
        for value in values:
            for rung, share in enumerate((1 / 16, 3 / 16, 12 / 16)):
                spent += share / 16
                others = seen.setdefault(rung, [])
                good = should_continue(ASHA, "min", value, others)
                others.append(value)
                if not good:
                    break
            else:
                continue
        assert min(seen[2]) == 0  # the best is never stopped
        shares.append(spent)
    assert sum(shares) / len(shares) < 0.3


def test_no_number_is_never_promoted_and_does_not_hold_up_others() -> None:
    assert not should_continue(ASHA, "min", math.nan, [])
    assert should_continue(ASHA, "min", 9.0, [math.nan, math.inf])


def test_the_median_waits_for_three() -> None:
    median = SchedulerConfig(name="median")
    assert should_continue(median, "min", 9.0, [1.0, 2.0])
    assert not should_continue(median, "min", 9.0, [1.0, 2.0, 3.0])
    assert should_continue(median, "min", 2.0, [1.0, 2.0, 3.0])


def test_brackets_take_turns() -> None:
    hyperband = SchedulerConfig(name="hyperband")
    assert [get_bracket(hyperband, trial, 3) for trial in range(5)] == [0, 1, 2, 0, 1]
    assert get_bracket(ASHA, 7, 3) == 0
