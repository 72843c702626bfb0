"""Plain data on its way to a Config: where each key stands, and every problem found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_training_toolkit.config.fields import Key, dotted
from llm_training_toolkit.errors import ConfigError


class Place(NamedTuple):
    """Where something stands, in order and in words."""

    order: tuple[int, int]
    """File before overrides, then by line or by position: the order of the lines in the error."""
    text: str


@dataclass
class Document:
    """What is read, from where, and what is wrong with it."""

    where: str
    data: Any = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[tuple[Place, str]] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)
    """Keys whose value has been reported: what pydantic says of them adds nothing."""

    def line(self, number: int) -> Place:
        """A line of the file."""
        return Place((0, number), f"{self.where}:{number}")

    def place(self, path: Key) -> Place:
        """Where a key stands, or else the nearest section above it."""
        known = (self.places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.places)
        return next(known, Place((0, 0), self.where))

    def report(self, path: Key, what: str, shown: str | None = None, place: Place | None = None) -> None:
        """Note a problem of a key; `shown` is its value, `place` where it stands if the key does not say it."""
        place = place or self.place(path)
        key = dotted(path)
        subject = f"{key} = {shown}: " if shown is not None else f"{key}: " if path else ""
        if place.text.startswith(f"override {key}="):
            subject = ""  # the override already shows key and value
        self.problems.append((place, f"{place.text}: {subject}{what}"))

    def raise_problems(self) -> None:
        """Raise ConfigError with a line for each problem, if there is any."""
        if self.problems:
            lines = [line for _, line in sorted(self.problems, key=lambda problem: problem[0].order)]
            raise ConfigError("\n".join(lines))
