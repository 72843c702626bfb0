"""The learning rate of every step, as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.errors import PlanError

Kind = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to the peak, then one of four shapes. Rates are absolute; `step` counts completed steps."""

    kind: Kind
    peak: float
    """Largest learning rate, reached by the last update of the warm-up."""
    steps: int
    """Length of the run."""
    warmup_steps: int
    decay_steps: int
    """Length of the decay at the end of `wsd`; the other shapes ignore it."""
    floor: float
    """Learning rate of the last update; `constant` ignores it."""

    def __post_init__(self) -> None:
        decay = self.decay_steps if self.kind == "wsd" else 0
        if self.steps < 1 or self.warmup_steps < 0 or decay < 0 or self.warmup_steps + decay > self.steps:
            raise PlanError(
                f"optim: warm-up of {self.warmup_steps} steps and decay of {decay} do not fit into {self.steps} steps"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that completes step `step + 1`.

        The first update already moves (peak / warm-up, not zero), the last one has the floor, and after the end of the
        run the last rate stays.
        """
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return self.peak
        progress = self._progress(step)
        if self.kind == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.peak * (1.0 - progress) + self.floor * progress

    def _progress(self, step: int) -> float:
        """How far from peak (0) to floor (1) an update is; 1 from the last one on."""
        last_at_peak = max(self.warmup_steps - 1, 0)
        if self.kind == "wsd":
            last_at_peak = self.steps - self.decay_steps - 1
        falling = self.steps - 1 - last_at_peak
        return min(max(step - last_at_peak, 0) / falling, 1.0) if falling > 0 else 0.0
