"""Which rank is slower than the others, step by step, and whether it stays so. Pure.

Ranks wait for each other in every step, so all of them take as long as the slowest. What tells them apart is the time
each spends before it waits: looking up its sequences and its forward passes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_SLOW_RATIO = 1.5
"""Times the median of the other ranks from which a rank counts as slow."""
_WINDOW_STEPS = 20
_MIN_SLOW_STEPS = 18
"""In how many of the last steps a rank must have been slow: one that hiccups is not meant."""


class Straggler(NamedTuple):
    """The slowest rank of a step."""

    rank: int
    ratio: float
    """Its seconds over the median of the other ranks."""


def find_slowest_rank(seconds: Sequence[float]) -> Straggler | None:
    """The slowest of at least two ranks; None where nothing was measured."""
    if len(seconds) < 2 or min(seconds) <= 0:
        return None
    rank = max(range(len(seconds)), key=lambda index: seconds[index])
    others = [taken for index, taken in enumerate(seconds) if index != rank]
    return Straggler(rank, seconds[rank] / statistics.median(others))


class StragglerDetector:
    """Follows the slowest rank over the steps of an attempt."""

    def __init__(self) -> None:
        self._recent: deque[Straggler] = deque(maxlen=_WINDOW_STEPS)
        self._named: set[int] = set()

    def observe_step(self, step: Straggler) -> Straggler | None:
        """Take a step; a rank that has been slow for long, with its median ratio, once for each rank."""
        self._recent.append(step)
        ratios = [each.ratio for each in self._recent if each.rank == step.rank and each.ratio > _SLOW_RATIO]
        if len(ratios) < _MIN_SLOW_STEPS or step.rank in self._named:
            return None
        self._named.add(step.rank)
        return Straggler(step.rank, statistics.median(ratios))
