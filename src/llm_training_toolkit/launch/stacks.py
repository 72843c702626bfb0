"""Where a rank stands, from the stacks of its threads that it wrote into its log."""

from __future__ import annotations

import re
from pathlib import Path

_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_COLLECTIVES = "torch/distributed/distributed_c10d.py"
"""Where every exchange between ranks passes through, DeepSpeed's too."""
_TRAINS = "worker_main"
"""The function that every worker's training thread is in."""


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
    own = next(frame for frame in frames if f"{Path(__file__).parents[1].name}/" in frame["file"])
    return _named(call) if own is call else f"{_named(call)}, called by {_named(own)}"


def _named(frame: re.Match[str]) -> str:
    return f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})"
