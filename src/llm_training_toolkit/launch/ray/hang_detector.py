"""Hang detection from the ranks' heartbeats, with the ranks that block the others. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.distributed.events import (
    WorkerStartedEvent,
)
from llm_training_toolkit.distributed.heartbeat import NON_STEP_TIMEOUT_FACTOR, HeartbeatSnapshot

_SILENCE_INTERVALS = 5.0  # heartbeat intervals that a rank's last one may be older than the freshest
_FRAME_PATTERN = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_COLLECTIVES_FILE = "torch/distributed/distributed_c10d.py"  # every collective passes through it, DeepSpeed's too
_TRAINING_FUNCTION = "worker_main"  # on the stack of every worker's training thread


@dataclass(frozen=True)
class HangReport:
    """Report that no rank has advanced for too long."""

    seconds: float
    """Seconds since the last advance."""
    blocking_ranks: Mapping[int, str]
    """Phase of each rank that blocks the others; of all ranks if none is behind."""
    is_silent: bool
    """True if those ranks do not even send heartbeats."""


@dataclass
class HangDetector:
    """Hang detector of one worker group."""

    size: int
    timeout_seconds: float
    """`failures.hang_timeout` in seconds."""
    heartbeat_seconds: float
    """Seconds between two heartbeats of a rank."""
    _heartbeats: dict[int, HeartbeatSnapshot] = field(default_factory=dict)
    _received_at: dict[int, float] = field(default_factory=dict)
    _last_advance: float | None = None
    has_stepped: bool = False
    """True if some rank has reached a step."""

    def observe_heartbeats(self, heartbeats: Mapping[int, tuple[HeartbeatSnapshot, float]], now: float) -> None:
        """Record each rank's newest heartbeat and its age in seconds."""
        for rank, (snapshot, age) in heartbeats.items():
            if self._heartbeats.get(rank) != snapshot:
                self._heartbeats[rank], self._last_advance = snapshot, now
                self.has_stepped = self.has_stepped or snapshot.is_in_step
            self._received_at[rank] = now - age

    def find_hang(self, now: float) -> HangReport | None:
        """Return the hang, if any; always None before the first heartbeat and after every rank is done."""
        working = [rank for rank in range(self.size) if rank not in self._heartbeats or not self._heartbeats[rank].done]
        if self._last_advance is None or not working:
            return None
        silent = self._find_silent_ranks(working)
        # The last phase of a silent rank may be outdated, so the ranks that still report set the timeout.
        timeout_ranks = [rank for rank in working if rank not in silent] or silent
        timeout_factor = max(
            self._heartbeats[rank].timeout_factor if rank in self._heartbeats else NON_STEP_TIMEOUT_FACTOR
            for rank in timeout_ranks
        )
        if now - self._last_advance <= timeout_factor * self.timeout_seconds:
            return None
        behind = silent or self._find_slowest_ranks(working)
        return HangReport(
            now - self._last_advance, {rank: self._get_rank_phase(rank) for rank in behind}, is_silent=bool(silent)
        )

    def _find_silent_ranks(self, working: list[int]) -> list[int]:
        freshest = max(self._received_at.values())
        return [
            rank
            for rank in working
            if rank in self._received_at
            and freshest - self._received_at[rank] > _SILENCE_INTERVALS * self.heartbeat_seconds
        ]

    def _find_slowest_ranks(self, working: list[int]) -> list[int]:
        marks = {rank: self._heartbeats[rank].phase_count if rank in self._heartbeats else -1 for rank in working}
        return [rank for rank in working if marks[rank] == min(marks.values())]

    def _get_rank_phase(self, rank: int) -> str:
        return self._heartbeats[rank].phase if rank in self._heartbeats else "starting its process"


def get_log_size(log: Path) -> int:
    """Return the size of a log, the offset of its next line."""
    return log.stat().st_size if log.exists() else 0


def find_current_call(log: Path, since: int) -> str:
    """Return the innermost calls of the training thread and of the toolkit in it, "" without a stack."""
    frames = _read_training_frames(log, since)
    return _format_call_with_caller(frames, frames[0]) if frames else ""


def find_collective_call(log: Path, since: int) -> str:
    """Return the collective that the training thread is in and its caller, "" outside of collectives."""
    frames = _read_training_frames(log, since)
    exchange = next((frame for frame in frames if frame["file"].endswith(_COLLECTIVES_FILE)), None)
    return _format_call_with_caller(frames, exchange) if exchange else ""


def _read_training_frames(log: Path, since: int) -> list[re.Match[str]]:
    """Return the training thread's frames, innermost first."""
    if get_log_size(log) <= since:
        return []
    with log.open("rb") as file:
        file.seek(since)
        written = file.read().decode(errors="replace")
    for thread in re.split(r"^(?:Current thread|Thread) ", written, flags=re.MULTILINE):
        frames = [frame for line in thread.splitlines() if (frame := _FRAME_PATTERN.match(line))]
        if any(frame["function"] == _TRAINING_FUNCTION for frame in frames):
            return frames
    return []


def _format_call_with_caller(frames: list[re.Match[str]], call: re.Match[str]) -> str:
    """Format a call and the toolkit's innermost frame."""
    own = next(frame for frame in frames if f"{Path(__file__).parents[2].name}/" in frame["file"])
    return _format_frame(call) if own is call else f"{_format_frame(call)}, called by {_format_frame(own)}"


def _format_frame(frame: re.Match[str]) -> str:
    return f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})"


def get_hang_timeout(config: Config) -> float:
    """Return `failures.hang_timeout` in seconds."""
    seconds = parse_duration_seconds(config.failures.hang_timeout)
    assert seconds is not None, "the schema takes durations alone"
    return seconds


def format_hung_rank(worker: WorkerStartedEvent, doing: str, state: str | None, stands: str) -> str:
    """Format the state of a rank that does not advance."""
    named = f"rank {worker.rank} (process {worker.pid} on node {worker.address}) was last heard of at: {doing}"
    if state is None:
        return f"{named}; its node does not answer"
    stopped = "; its process had been stopped (SIGSTOP)" if state == "stopped" else ""
    return named + stopped + (f"; it stands in {stands}" if stands else f"; its process is {state}")
