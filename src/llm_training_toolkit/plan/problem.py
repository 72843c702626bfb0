"""What a plan finds wrong: where, what, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One reason why a run cannot start as it is configured."""

    where: str
    """The dotted key of the configuration."""
    what: str
    """What is wrong, with the value."""
    fix: str
    """What to write instead."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"
