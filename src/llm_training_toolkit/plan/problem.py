"""Problem of a plan (code, key, description, fix), and counts in its words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Reason why a run cannot start as configured."""

    code: str
    """Stable name, for scripts and tests; the words may change."""
    where: str
    """Dotted key of the configuration."""
    what: str
    """Description of the problem, with the value."""
    fix: str
    """Suggested change."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


def format_plural(value: int, noun: str, plural: str = "s") -> str:
    """Return a count with its noun: `1 worker`, `2,000 workers`."""
    return f"{value:,} {noun}{'' if value == 1 else plural}"
