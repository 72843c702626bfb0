"""Whether the ranks still advance, told from their pulses, and which of them holds up the others. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm_training_toolkit.pulse import OUTSIDE_STEPS, Beat

_SILENT = 5.0
"""Times the interval between two beats that a rank's last one may be older than the freshest."""


@dataclass(frozen=True)
class Hang:
    """No rank has advanced for too long."""

    seconds: float
    """Since the last advance."""
    behind: Mapping[int, str]
    """The ranks that hold up the others, and what each is doing; all of them where none is behind."""
    silent: bool
    """Those ranks do not even send heartbeats."""


@dataclass
class Watch:
    """Follows the pulses of one group of workers."""

    size: int
    hang: float
    """`failures.hang` in seconds."""
    beats_every: float
    """Seconds between two beats of a rank."""
    _beats: dict[int, Beat] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _advanced: float | None = None
    stepped: bool = False
    """Some rank has come to a step."""

    def see(self, heard: Mapping[int, tuple[Beat, float]], now: float) -> None:
        """Take each rank's newest beat and its age in seconds."""
        for rank, (beat, age) in heard.items():
            if self._beats.get(rank) != beat:
                self._beats[rank], self._advanced = beat, now
                self.stepped = self.stepped or beat.in_a_step
            self._heard[rank] = now - age

    def hung(self, now: float) -> Hang | None:
        """The hang, if there is one; None before the first beat and when every rank is done."""
        working = [rank for rank in range(self.size) if rank not in self._beats or not self._beats[rank].done]
        if self._advanced is None or not working:
            return None
        silent = self._silent(working)
        # A rank that is silent was last heard of some time before it fell silent: the others know better what is done.
        asked = [rank for rank in working if rank not in silent] or silent
        patience = max(self._beats[rank].patience if rank in self._beats else OUTSIDE_STEPS for rank in asked)
        if now - self._advanced <= patience * self.hang:
            return None
        behind = silent or self._slowest(working)
        return Hang(now - self._advanced, {rank: self._doing(rank) for rank in behind}, silent=bool(silent))

    def _silent(self, working: list[int]) -> list[int]:
        freshest = max(self._heard.values())
        return [
            rank
            for rank in working
            if rank in self._heard and freshest - self._heard[rank] > _SILENT * self.beats_every
        ]

    def _slowest(self, working: list[int]) -> list[int]:
        marks = {rank: self._beats[rank].marks if rank in self._beats else -1 for rank in working}
        return [rank for rank in working if marks[rank] == min(marks.values())]

    def _doing(self, rank: int) -> str:
        return self._beats[rank].doing if rank in self._beats else "starting its process"
