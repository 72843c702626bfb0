"""A rank's pulse: what it is doing, and that it gets on. Written by the rank that works, read by a thread that watches.

A mark is a few assignments; whoever watches sees the number of marks grow, or not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

WITHIN_A_STEP = 1.0
"""Times `failures.hang` that may pass without a mark: micro-batches, the exchange between ranks, the update."""
OUTSIDE_STEPS = 3.0
"""The same while building, compiling in an attempt's first step, evaluating and saving, whose pieces are larger."""
UNLIMITED = math.inf
"""The same where no other rank waits: the export on rank 0."""


class Beat(NamedTuple):
    """A pulse at one moment."""

    marks: int
    """How often the rank has said where it is; all ranks say so in the same order."""
    doing: str
    patience: float
    """Times `failures.hang` that this may take."""
    done: bool
    """The rank has returned, and nobody waits for it."""

    @property
    def in_a_step(self) -> bool:
        """Whether the rank is at a step, not at what comes before the first one or between two."""
        return self.doing.startswith("step ")


class Pulse:
    """Where a rank stands."""

    def __init__(self) -> None:
        self._beat = Beat(0, "starting", OUTSIDE_STEPS, done=False)

    def mark(self, doing: str, patience: float = OUTSIDE_STEPS) -> None:
        """The rank begins something, or another piece of it."""
        self._beat = Beat(self._beat.marks + 1, doing, patience, done=False)

    def advance(self, doing: str) -> None:
        """The rank gets on with what it marked last, in pieces that other ranks may have more or fewer of.

        They count as no marks, by which it is told who is behind; another text each time is what shows the advance.
        """
        self._beat = self._beat._replace(doing=doing)

    def finish(self) -> None:
        """The rank has done all it was there for."""
        self._beat = Beat(self._beat.marks + 1, "done", UNLIMITED, done=True)

    def read(self) -> Beat:
        """Where the rank stands now."""
        return self._beat
