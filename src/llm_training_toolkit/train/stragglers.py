"""Straggler detection: the slowest rank of each step, and ranks that are slow for many steps. Pure.

Ranks wait for each other in every step, so all of them take as long as the slowest. Only the time before the wait
differs: looking up sequences, and forward passes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_SLOW_RATIO = 1.5  # a rank above this many times the median of the other ranks is slow
_WINDOW_STEPS = 20
_MIN_SLOW_STEPS = 18  # slow steps in the window before a rank is reported; a hiccup is ignored


class Straggler(NamedTuple):
    """Slowest rank of a step."""

    rank: int
    ratio: float
    """Its seconds over the median of the other ranks."""


def find_slowest_rank(seconds: Sequence[float]) -> Straggler | None:
    """Return the slowest of at least two ranks; otherwise, or if seconds are missing, return None."""
    if len(seconds) < 2 or min(seconds) <= 0:
        return None
    rank = max(range(len(seconds)), key=lambda index: seconds[index])
    others = [taken for index, taken in enumerate(seconds) if index != rank]
    return Straggler(rank, seconds[rank] / statistics.median(others))


class StragglerDetector:
    """Record of the slowest rank over the steps of an attempt."""

    def __init__(self) -> None:
        self._recent: deque[Straggler] = deque(maxlen=_WINDOW_STEPS)
        self._named: set[int] = set()

    def observe_step(self, step: Straggler) -> Straggler | None:
        """Add a step. Return a rank that has been slow for long, with its median ratio, once per rank."""
        self._recent.append(step)
        ratios = [each.ratio for each in self._recent if each.rank == step.rank and each.ratio > _SLOW_RATIO]
        if len(ratios) < _MIN_SLOW_STEPS or step.rank in self._named:
            return None
        self._named.add(step.rank)
        return Straggler(step.rank, statistics.median(ratios))
