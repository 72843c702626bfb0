"""Which rank is slower than the others, step by step, and whether it stays so. Pure.

Ranks wait for each other in every step, so all of them take as long as the slowest. What tells them apart is the time
each spends before it waits: looking up its sequences and its forward passes.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

_SLOW = 1.5
"""Times the median of the other ranks from which a rank counts as slow."""
_STEPS = 20
_OF_THEM = 18
"""In how many of the last steps a rank must have been slow: one that hiccups is not meant."""


class Slowest(NamedTuple):
    """The slowest rank of a step."""

    rank: int
    ratio: float
    """Its seconds over the median of the other ranks."""


def slowest(seconds: Sequence[float]) -> Slowest | None:
    """The slowest of at least two ranks; None where nothing was measured."""
    if len(seconds) < 2 or min(seconds) <= 0:
        return None
    rank = max(range(len(seconds)), key=lambda index: seconds[index])
    others = [taken for index, taken in enumerate(seconds) if index != rank]
    return Slowest(rank, seconds[rank] / statistics.median(others))


class Pace:
    """Follows the slowest rank over the steps of an attempt."""

    def __init__(self) -> None:
        self._recent: deque[Slowest] = deque(maxlen=_STEPS)
        self._named: set[int] = set()

    def see(self, step: Slowest) -> Slowest | None:
        """Take a step; a rank that has been slow for long, with its median ratio, once for each rank."""
        self._recent.append(step)
        ratios = [each.ratio for each in self._recent if each.rank == step.rank and each.ratio > _SLOW]
        if len(ratios) < _OF_THEM or step.rank in self._named:
            return None
        self._named.add(step.rank)
        return Slowest(step.rank, statistics.median(ratios))
