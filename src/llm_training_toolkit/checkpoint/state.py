"""Training state that a checkpoint carries beside weights: progress, recent losses, skipped steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class TrainState:
    """Progress of a run."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens seen along the lineage, padding included."""
    sequences: int = 0
    """Sequences seen along the lineage."""
    skips: tuple[SkippedStep, ...] = ()
    """Skipped updates along the lineage."""
    recent: tuple[StepStats, ...] = ()
    """Last steps, for comparison with the next one."""


class StepStats(NamedTuple):
    """Loss and gradient norm of a step, for comparison with later ones."""

    loss: float
    norm: float
    """Gradient norm before clipping."""


class SkippedStep(NamedTuple):
    """Skipped update."""

    step: int
    """Counted from 1."""
    first: int
    """First of the step's sequences, counted along the lineage."""
    sequences: int
