"""A rank's pulse: what it is doing, and that it gets on. Written by the rank that works, read by a thread that watches.

A mark is a few assignments; whoever watches sees the number of marks grow, or not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

STEP_TIMEOUT_FACTOR = 1.0
"""Times `failures.hang_timeout` that may pass without a mark: micro-batches, the exchange between ranks, the update."""
NON_STEP_TIMEOUT_FACTOR = 3.0
"""The same while building, compiling in an attempt's first step, evaluating and saving, whose pieces are larger."""
NO_TIMEOUT = math.inf
"""The same where no other rank waits: the export on rank 0."""


class HeartbeatSnapshot(NamedTuple):
    """A pulse at one moment."""

    phase_count: int
    """How often the rank has said where it is; all ranks say so in the same order."""
    phase: str
    timeout_factor: float
    """Times `failures.hang_timeout` that this may take."""
    done: bool
    """The rank has returned, and nobody waits for it."""

    @property
    def is_in_step(self) -> bool:
        """Whether the rank is at a step, not at what comes before the first one or between two."""
        return self.phase.startswith("step ")


class Heartbeat:
    """Where a rank stands."""

    def __init__(self) -> None:
        self._beat = HeartbeatSnapshot(0, "starting", NON_STEP_TIMEOUT_FACTOR, done=False)

    def set_phase(self, doing: str, patience: float = NON_STEP_TIMEOUT_FACTOR) -> None:
        """The rank begins something, or another piece of it."""
        self._beat = HeartbeatSnapshot(self._beat.phase_count + 1, doing, patience, done=False)

    def keepalive(self, doing: str) -> None:
        """The rank gets on with what it marked last, in pieces that other ranks may have more or fewer of.

        They count as no marks, by which it is told who is behind; another text each time is what shows the advance.
        """
        self._beat = self._beat._replace(phase=doing)

    def mark_done(self) -> None:
        """The rank has done all it was there for."""
        self._beat = HeartbeatSnapshot(self._beat.phase_count + 1, "done", NO_TIMEOUT, done=True)

    def get_snapshot(self) -> HeartbeatSnapshot:
        """Where the rank stands now."""
        return self._beat
