"""Problem of a plan (code, key, description, fix), and counts in its words."""

from __future__ import annotations

from llm_training_toolkit.errors import Problem

__all__ = ["Problem", "format_plural"]


def format_plural(value: int, noun: str, plural: str = "s") -> str:
    """Return a count with its noun: `1 worker`, `2,000 workers`."""
    return f"{value:,} {noun}{'' if value == 1 else plural}"
