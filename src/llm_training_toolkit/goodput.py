"""Where the time of a run goes: every second of it is put down to one of six parts, so they add up to all of it. Pure.

The account goes on over attempts and commands: each begins with what the ones before have put down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, get_args

Part = Literal["startup", "data", "step", "checkpoint", "recomputation", "idle"]
"""startup: from the command, or from the moment new workers are asked for, to the first step.
data: looking up sequences, and waiting for data that is being prepared.
step: steps done for the first time, and evaluations.
checkpoint: what the steps wait for while a checkpoint is copied or completed, and the export.
recomputation: steps done again after a failure.
idle: from an attempt's last step to the moment that new workers are asked for: what a failure or a change of size costs
before anything begins anew. The time after a stop that was asked for is none of the run's."""
PARTS: tuple[Part, ...] = get_args(Part)
Split = dict[Part, float]
"""Seconds by part."""


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970, asked of the machine once: setting its clock later moves nothing."""
    wall, counted = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - counted


class Account:
    """The account of an attempt, on rank 0: what it is doing now, and what was put down so far."""

    def __init__(
        self, began: float, before: Mapping[Part, float], reached: int, clock: Callable[[], float] | None = None
    ) -> None:
        """`began`: when these workers were asked for; `reached`: the last step that was ever completed before."""
        self._clock, self._since = clock or steady_clock(), began
        self._split: Split = {part: before.get(part, 0.0) for part in PARTS}
        self._reached = reached
        self._doing: Part = "startup"

    def enter(self, part: Part) -> None:
        """From now on time goes to `part`."""
        now = max(self._clock(), self._since)  # where `began` is of a clock that is ahead, nothing is taken away
        self._split[self._doing] += now - self._since
        self._doing, self._since = part, now

    def enter_step(self, step: int) -> None:
        """From now on time goes to step number `step`, counted from 1."""
        self.enter("step" if step > self._reached else "recomputation")

    def values(self) -> dict[str, float]:
        """The account until now, as metrics; `goodput/fraction` is the part that went into steps."""
        self.enter(self._doing)
        total = sum(self._split.values())
        seconds = {f"goodput/{part}_seconds": round(self._split[part], 3) for part in PARTS}
        return seconds | {"goodput/fraction": self._split["step"] / total if total else 0.0}


def split_of(row: Mapping[str, float]) -> Split:
    """The account that a row of metrics holds; empty where it holds none."""
    return {part: float(row[name]) for part in PARTS if (name := f"goodput/{part}_seconds") in row}


def in_words(split: Mapping[Part, float]) -> str:
    """A split as one line: the share of the steps, then seconds by part."""
    total = sum(split.values())
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in split.items())
    return f"goodput {split['step'] / total:.0%} of {total:.0f} s: {parts}" if total else "goodput: nothing yet"
