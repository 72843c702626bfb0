"""Training state that a checkpoint carries beside weights: progress, recent losses, skipped steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens seen along the lineage, padding included."""
    sequences: int = 0
    """Sequences seen along the lineage."""
    skips: tuple[SkippedStep, ...] = ()
    """Updates that were left out along the lineage."""
    recent: tuple[StepStats, ...] = ()
    """The last steps, as the next one is compared with them."""


class StepStats(NamedTuple):
    """A step's numbers, as later ones are compared with them."""

    loss: float
    norm: float
    """The gradient's, before clipping."""


class SkippedStep(NamedTuple):
    """An update that was left out."""

    step: int
    """Counted from 1."""
    first: int
    """The first of the step's sequences, counted along the lineage."""
    sequences: int
