"""Plain data on its way to a Config: where each key stands, and every problem found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_training_toolkit.config.fields import KeyPath, format_key
from llm_training_toolkit.errors import ConfigError


class ConfigLocation(NamedTuple):
    """Where something stands, in order and in words."""

    order: tuple[int, int]
    """File before overrides, then by line or by position: the order of the lines in the error."""
    text: str


@dataclass
class ConfigDocument:
    """What is read, from where, and what is wrong with it."""

    where: str
    data: Any = field(default_factory=dict)
    locations: dict[KeyPath, ConfigLocation] = field(default_factory=dict)
    problems: list[tuple[ConfigLocation, str]] = field(default_factory=list)
    reported_keys: set[KeyPath] = field(default_factory=set)
    """Keys whose value has been reported: what pydantic says of them adds nothing."""

    def locate_line(self, number: int) -> ConfigLocation:
        """A line of the file."""
        return ConfigLocation((0, number), f"{self.where}:{number}")

    def locate_key(self, path: KeyPath) -> ConfigLocation:
        """Where a key stands, or else the nearest section above it."""
        known = (self.locations[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.locations)
        return next(known, ConfigLocation((0, 0), self.where))

    def report_problem(
        self, path: KeyPath, what: str, shown: str | None = None, place: ConfigLocation | None = None
    ) -> None:
        """Note a problem of a key; `shown` is its value, `place` where it stands if the key does not say it."""
        place = place or self.locate_key(path)
        key = format_key(path)
        subject = f"{key} = {shown}: " if shown is not None else f"{key}: " if path else ""
        if place.text.startswith(f"override {key}="):
            subject = ""  # the override already shows key and value
        self.problems.append((place, f"{place.text}: {subject}{what}"))

    def raise_problems(self) -> None:
        """Raise ConfigError with a line for each problem, if there is any."""
        if self.problems:
            lines = [line for _, line in sorted(self.problems, key=lambda problem: problem[0].order)]
            raise ConfigError("\n".join(lines))
