"""Heartbeat of a rank: its current phase and the number of phases so far. Set by the rank, read by another thread.

Setting a phase costs a few assignments; the reader sees the count grow or stop.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Multiples of `failures.hang_timeout` that one phase may take.
STEP_TIMEOUT_FACTOR = 1.0  # in a step: micro-batches, the all-reduce between ranks, the update
NON_STEP_TIMEOUT_FACTOR = 3.0  # larger pieces: building, an attempt's first step (compiles), evaluating, saving
NO_TIMEOUT = math.inf  # no other rank waits (export on rank 0), or the wait is for data, tasks or a rung


class HeartbeatSnapshot(NamedTuple):
    """Heartbeat at one moment."""

    phase_count: int
    """Number of phases set so far; all ranks set the same phases in the same order."""
    phase: str
    timeout_factor: float
    """Multiple of `failures.hang_timeout` that this phase may take."""
    done: bool
    """True once the rank has returned and other ranks no longer wait for it."""

    @property
    def is_in_step(self) -> bool:
        """True within a step; False before the first one and between two."""
        return self.phase.startswith("step ")


class Heartbeat:
    """Current phase of a rank."""

    def __init__(self) -> None:
        self._beat = HeartbeatSnapshot(0, "starting", NON_STEP_TIMEOUT_FACTOR, done=False)

    def set_phase(self, doing: str, patience: float = NON_STEP_TIMEOUT_FACTOR) -> None:
        """Begin a phase, or another piece of one."""
        self._beat = HeartbeatSnapshot(self._beat.phase_count + 1, doing, patience, done=False)

    def keepalive(self, doing: str) -> None:
        """Report progress within the current phase, by a text that differs each time.

        Not counted as a phase, because ranks may do different numbers of these pieces, and the count shows which rank
        is behind.
        """
        self._beat = self._beat._replace(phase=doing)

    def mark_done(self) -> None:
        """Mark the work of this rank as done."""
        self._beat = HeartbeatSnapshot(self._beat.phase_count + 1, "done", NO_TIMEOUT, done=True)

    def get_snapshot(self) -> HeartbeatSnapshot:
        """Return the current heartbeat."""
        return self._beat
