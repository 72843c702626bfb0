"""Rungs at which trials are compared, and the decision which of them continue. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from llm_training_toolkit.config.search import SchedulerConfig

_MEDIAN_MIN_TRIALS = 3  # trials that must have passed a rung before their median counts
_MEDIAN_RUNGS = 8  # rungs of median stopping if the grace period is absent


def compute_rung_steps(scheduler: SchedulerConfig, steps: int, tokens_per_step: int) -> tuple[int, ...]:
    """Return the steps after which a trial is compared; the last one is its end."""
    if scheduler.name == "fifo":
        return (steps,)
    first = _compute_first_rung(scheduler, steps, tokens_per_step)
    found: list[int] = []
    for number in range(steps):
        ahead = first * (number + 1 if scheduler.name == "median" else scheduler.reduction_factor**number)
        step = math.ceil(ahead - 1e-9)
        if step >= steps:
            break
        if not found or step > found[-1]:
            found.append(step)
    return (*found, steps)


def _compute_first_rung(scheduler: SchedulerConfig, steps: int, tokens_per_step: int) -> float:
    """Return the first rung in steps, at least 1."""
    if scheduler.grace_period_tokens is not None:
        return max(scheduler.grace_period_tokens / tokens_per_step, 1.0)
    if scheduler.grace_period_steps is not None:
        return float(scheduler.grace_period_steps)
    parts = _MEDIAN_RUNGS if scheduler.name == "median" else scheduler.reduction_factor**2
    return max(steps / parts, 1.0)


def get_bracket(scheduler: SchedulerConfig, trial: int, rungs: int) -> int:
    """Return the number of rungs a trial passes without comparison; Hyperband's trials take turns."""
    return trial % rungs if scheduler.name == "hyperband" else 0


def is_better(mode: str, one: float, other: float) -> bool:
    """Return whether `one` is better than `other`; NaN and infinity are the worst."""
    return get_sort_key(mode, one) < get_sort_key(mode, other)


def get_sort_key(mode: str, value: float) -> float:
    """Return a key that sorts the best value first."""
    if not math.isfinite(value):
        return math.inf
    return value if mode == "min" else -value


def should_continue(scheduler: SchedulerConfig, mode: str, value: float, others: Sequence[float]) -> bool:
    """Return whether a trial with this value at a rung continues, given the others of its bracket there."""
    if scheduler.name == "fifo":
        return True
    if not math.isfinite(value):
        return False
    if scheduler.name == "median":
        known = [get_sort_key(mode, other) for other in others]
        return len(known) < _MEDIAN_MIN_TRIALS or get_sort_key(mode, value) <= statistics.median(known)
    kept = max(1, (len(others) + 1) // scheduler.reduction_factor)
    return sum(is_better(mode, other, value) for other in others) < kept
