"""Whether the ranks still advance, told from their pulses, and which of them holds up the others. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_training_toolkit.distributed.heartbeat import OUTSIDE_STEPS, Beat

_SILENT = 5.0
"""Times the interval between two beats that a rank's last one may be older than the freshest."""
_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
"""Where every exchange between ranks passes through, DeepSpeed's too."""
_TRAINS = "worker_main"
"""The function that every worker's training thread is in."""


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


def size_of(log: Path) -> int:
    """Where the next thing written to a log will stand."""
    return log.stat().st_size if log.exists() else 0


def stands_in(log: Path, since: int) -> str:
    """The innermost call of the training thread, and the innermost of the toolkit's own; empty without a stack."""
    frames = _training_frames(log, since)
    return _with_caller(frames, frames[0]) if frames else ""


def waits_in(log: Path, since: int) -> str:
    """The exchange with other ranks that the training thread is in, and who called it; empty where it is in none."""
    frames = _training_frames(log, since)
    exchange = next((frame for frame in frames if frame["file"].endswith(_COLLECTIVES)), None)
    return _with_caller(frames, exchange) if exchange else ""


def _training_frames(log: Path, since: int) -> list[re.Match[str]]:
    """The training thread's frames, the innermost first."""
    if size_of(log) <= since:
        return []
    with log.open("rb") as file:
        file.seek(since)
        written = file.read().decode(errors="replace")
    for thread in re.split(r"^(?:Current thread|Thread) ", written, flags=re.MULTILINE):
        frames = [frame for line in thread.splitlines() if (frame := _FRAME.match(line))]
        if any(frame["function"] == _TRAINS for frame in frames):
            return frames
    return []


def _with_caller(frames: list[re.Match[str]], call: re.Match[str]) -> str:
    """A call, and the innermost of the toolkit's own."""
    own = next(frame for frame in frames if f"{Path(__file__).parents[2].name}/" in frame["file"])
    return _named(call) if own is call else f"{_named(call)}, called by {_named(own)}"


def _named(frame: re.Match[str]) -> str:
    return f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})"
