"""What a task gives: its figures, what they were measured on, and what came of every single item."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total); total is 0 while it is not known."""
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """The outcome of a task."""

    figures: Figures
    """By the names of `ltt evaluate --json`."""
    data: str
    """What it was measured on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides about the figures."""
    notes: Sequence[str] = ()
    """What a person must know beside them."""
    items: Sequence[Mapping[str, Any]] = ()
    """Every document or completion with its own outcome; JSON values."""
