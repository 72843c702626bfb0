"""Configuration before validation: plain data, with the location of each key and all problems found so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_training_toolkit.config.fields import KeyPath, format_key
from llm_training_toolkit.errors import ConfigError, Problem


class ConfigLocation(NamedTuple):
    """Location of a key: its sort order and its text in messages."""

    order: tuple[int, int]
    """Order of the error's lines: the file before overrides, then by line or override position."""
    text: str


@dataclass
class RawConfig:
    """Plain data of one file, JSON text or mapping, with locations and problems."""

    where: str
    data: Any = field(default_factory=dict)
    locations: dict[KeyPath, ConfigLocation] = field(default_factory=dict)
    problems: list[tuple[ConfigLocation, str, Problem]] = field(default_factory=list)
    """Location, line of the error, and the same as data."""
    reported_keys: set[KeyPath] = field(default_factory=set)
    """Keys with a reported value; pydantic's errors on them are dropped."""

    def locate_line(self, number: int) -> ConfigLocation:
        """Return the location of a line of the file."""
        return ConfigLocation((0, number), f"{self.where}:{number}")

    def locate_key(self, path: KeyPath) -> ConfigLocation:
        """Return the location of a key, or of the nearest section above it."""
        known = (self.locations[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.locations)
        return next(known, ConfigLocation((0, 0), self.where))

    def report_problem(
        self, path: KeyPath, what: str, shown: str | None = None, location: ConfigLocation | None = None
    ) -> None:
        """Record a problem of a key. `shown` is its value; `location` overrides the key's own location."""
        location = location or self.locate_key(path)
        key = format_key(path)
        subject = f"{key} = {shown}: " if shown is not None else f"{key}: " if path else ""
        if location.text.startswith(f"override {key}="):
            subject = ""  # the override already shows key and value
        problem = Problem(ConfigError.code, key, what if shown is None else f"{shown}: {what}", "")
        self.problems.append((location, f"{location.text}: {subject}{what}", problem))

    def raise_problems(self) -> None:
        """Raise ConfigError with one line per problem, if there are any."""
        if self.problems:
            found = sorted(self.problems, key=lambda problem: problem[0].order)
            message = "\n".join(line for _, line, _ in found)
            raise ConfigError.from_problems(message, (problem for _, _, problem in found))
