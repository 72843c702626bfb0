"""The learning rate: its ends, its direction, no jumps."""

from itertools import pairwise
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import LRSchedule
from llm_training_toolkit.plan.lr_schedule import ScheduleKind

KINDS: tuple[ScheduleKind, ...] = get_args(ScheduleKind)
ROUNDING = 1e-15


@st.composite
def schedules(draw: st.DrawFn) -> LRSchedule:
    steps = draw(st.integers(2, 300))
    warmup = draw(st.integers(0, steps - 1))
    decay = draw(st.integers(0, steps - warmup))
    return LRSchedule(draw(st.sampled_from(KINDS)), 1.0, steps, warmup, decay, floor=draw(st.floats(0.0, 1.0)))


@given(schedules())
def test_warm_up_starts_above_zero_and_ends_at_the_peak(schedule: LRSchedule) -> None:
    if schedule.warmup_steps:
        assert schedule.compute_lr(0) == pytest.approx(1.0 / schedule.warmup_steps)
        assert schedule.compute_lr(schedule.warmup_steps - 1) == 1.0
    elif schedule.kind != "wsd" or schedule.decay_steps < schedule.steps:
        assert schedule.compute_lr(0) == 1.0


@given(schedules())
def test_the_last_update_has_the_floor_and_it_stays(schedule: LRSchedule) -> None:
    falls = schedule.kind in {"linear", "cosine"} or (schedule.kind == "wsd" and schedule.decay_steps > 0)
    expected = schedule.floor if falls else 1.0
    assert schedule.compute_lr(schedule.steps - 1) == pytest.approx(expected)
    assert schedule.compute_lr(schedule.steps + 50) == schedule.compute_lr(schedule.steps - 1)


@given(schedules())
def test_it_rises_then_falls_within_its_bounds(schedule: LRSchedule) -> None:
    rates = [schedule.compute_lr(step) for step in range(schedule.steps)]
    turn = max(schedule.warmup_steps - 1, 0)
    assert all(low <= high for low, high in pairwise(rates[: turn + 1]))
    assert all(high >= low - ROUNDING for high, low in pairwise(rates[turn:]))
    assert all(0.0 <= rate <= 1.0 + ROUNDING for rate in rates)


@pytest.mark.parametrize("kind", KINDS)
def test_no_jump_after_the_warm_up(kind: ScheduleKind) -> None:
    schedule = LRSchedule(kind, 3e-4, 1000, 100, 200, floor=3e-5)
    steepest = max(abs(schedule.compute_lr(step + 1) - schedule.compute_lr(step)) for step in range(999))
    assert steepest <= 3e-4 / 100 * 1.001


def test_cosine_is_half_way_in_the_middle() -> None:
    schedule = LRSchedule("cosine", 1.0, 101, 0, 0, floor=0.2)
    assert schedule.compute_lr(50) == pytest.approx(0.6)


def test_wsd_is_stable_until_the_decay() -> None:
    schedule = LRSchedule("wsd", 1.0, 100, 10, 20, floor=0.0)
    assert {schedule.compute_lr(step) for step in range(10, 80)} == {1.0}
    assert schedule.compute_lr(80) == pytest.approx(0.95)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    assert LRSchedule("cosine", 1.0, 1, 1, 0, floor=0.1).compute_lr(0) == 1.0


@pytest.mark.parametrize(("warmup", "decay"), [(11, 0), (6, 5), (-1, 0)])
def test_parts_longer_than_the_run_are_refused(warmup: int, decay: int) -> None:
    with pytest.raises(PlanError, match="do not fit"):
        LRSchedule("wsd", 1.0, 10, warmup, decay, floor=0.0)
