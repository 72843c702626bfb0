"""Where a rank stands, from the stacks of its threads that it wrote into its log."""

from __future__ import annotations

import re
from pathlib import Path

_FRAME = re.compile(r'^\s+File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)$')
_TRAINS = "worker_main"
"""The function that every worker's training thread is in."""


def size_of(log: Path) -> int:
    """Where the next thing written to a log will stand."""
    return log.stat().st_size if log.exists() else 0


def stands_in(log: Path, since: int) -> str:
    """The innermost call of the training thread, and the innermost of the toolkit's own; empty without a stack."""
    if size_of(log) <= since:
        return ""
    with log.open("rb") as file:
        file.seek(since)
        written = file.read().decode(errors="replace")
    for thread in re.split(r"^(?:Current thread|Thread) ", written, flags=re.MULTILINE):
        frames = [frame for line in thread.splitlines() if (frame := _FRAME.match(line))]
        if any(frame["function"] == _TRAINS for frame in frames):
            own = next(frame for frame in frames if f"{Path(__file__).parents[1].name}/" in frame["file"])
            called = "" if own is frames[0] else f", called by {_named(own)}"
            return f"{_named(frames[0])}{called}"
    return ""


def _named(frame: re.Match[str]) -> str:
    return f"{frame['function']} ({Path(frame['file']).name}:{frame['line']})"
