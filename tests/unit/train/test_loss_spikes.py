"""Spikes: what stands out is found whatever the scale, what is usual is not, and a few spikes hide no further one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats
from llm_training_toolkit.train.loss_spikes import (
    MIN_SPIKE_STEPS,
    SPIKE_WINDOW_STEPS,
    append_recent_step,
    count_consecutive_skips,
    detect_spike,
)

MANY = 10**12
"""Loss tokens: so many that chance has no part in the mean."""


def history(seed: int, count: int = SPIKE_WINDOW_STEPS, scale: float = 1.0) -> list[StepStats]:
    """Losses around 3 that vary by 0.05 and norms around 1 that vary by a third, times `scale`."""
    draw = random.Random(seed)
    return [StepStats(scale * draw.gauss(3.0, 0.05), scale * draw.lognormvariate(0.0, 0.3)) for _ in range(count)]


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_usual_steps_are_no_spikes_at_any_scale(seed: int, scale: float) -> None:
    recent = history(seed, SPIKE_WINDOW_STEPS + 1, scale)
    assert detect_spike(recent[-1], MANY, recent[:-1]) is None


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.integers(0, SPIKE_WINDOW_STEPS // 4))
def test_a_loss_half_as_high_again_is_one_whatever_spikes_came_before(seed: int, scale: float, earlier: int) -> None:
    recent = history(seed, scale=scale)
    for index in range(earlier):
        recent[3 * index] = StepStats(scale * 50.0, scale * 500.0)
    assert "the loss is" in str(detect_spike(StepStats(scale * 4.5, scale), MANY, recent))
    assert "the gradient's norm is" in str(detect_spike(StepStats(scale * 3.0, scale * 60.0), MANY, recent))


@given(st.integers(0, 10**6))
def test_a_gradient_below_ten_times_the_usual_one_is_none(seed: int) -> None:
    assert detect_spike(StepStats(3.0, 9.0 * 0.85), MANY, history(seed)) is None


def test_losses_that_fall_are_no_spikes_and_equal_ones_leave_room_for_a_tenth() -> None:
    falling = [StepStats(10.0 - index / 20, 1.0) for index in range(SPIKE_WINDOW_STEPS)]
    assert detect_spike(StepStats(10.0, 1.0), MANY, falling) is None
    equal = [StepStats(2.0, 0.0)] * SPIKE_WINDOW_STEPS
    assert detect_spike(StepStats(2.2, 0.0), MANY, equal) is None
    assert "above its median of 2" in str(detect_spike(StepStats(2.3, 0.0), MANY, equal))


def test_what_chance_makes_of_few_tokens_is_none() -> None:
    recent = [StepStats(0.96 + 0.05 * (-1) ** index, 1.0) for index in range(SPIKE_WINDOW_STEPS)]
    assert detect_spike(StepStats(2.97, 1.0), 256, recent) is None  # of a healthy run
    assert "the loss is" in str(detect_spike(StepStats(2.97, 1.0), 2048, recent))


def test_nothing_is_judged_before_enough_is_known() -> None:
    assert detect_spike(StepStats(1e9, 1e9), MANY, history(1, MIN_SPIKE_STEPS - 1)) is None
    assert detect_spike(StepStats(1e9, 1e9), MANY, history(1, MIN_SPIKE_STEPS))


@given(st.integers(0, 3 * SPIKE_WINDOW_STEPS))
def test_the_last_steps_are_remembered_in_order(count: int) -> None:
    recent: tuple[StepStats, ...] = ()
    for index in range(count):
        recent = append_recent_step(recent, StepStats(float(index), 1.0))
    assert [step.loss for step in recent] == [
        float(index) for index in range(max(0, count - SPIKE_WINDOW_STEPS), count)
    ]


@pytest.mark.parametrize(("left_out", "step", "row"), [([], 5, 0), ([5], 5, 1), ([3, 5], 5, 1), ([3, 4, 5], 5, 3)])
def test_updates_left_out_in_a_row(left_out: list[int], step: int, row: int) -> None:
    assert count_consecutive_skips([SkippedStep(each, 0, 1) for each in left_out], step) == row
