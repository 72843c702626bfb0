"""Redirection of library output to a log file, below Python, so that the screen shows only our own output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO


def open_terminal_copy(descriptor: int) -> IO[str]:
    """Return a file on the current standard output (1) or error (2) that survives `redirect_output`."""
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8", errors="replace")


_END = 16_384  # bytes read from the end of a log


def read_last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log without blank ones; empty if there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


_saved_descriptors: dict[int, int] = {}  # copies of standard output and error from before the first `redirect_output`


def redirect_output(path: Path) -> None:
    """Append standard output and error of this process, and of its future children, to a file."""
    for descriptor in (1, 2):
        if descriptor not in _saved_descriptors:
            _saved_descriptors[descriptor] = os.dup(descriptor)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)


def restore_output() -> None:
    """Undo every `redirect_output`."""
    sys.stdout.flush()
    sys.stderr.flush()
    while _saved_descriptors:
        descriptor, saved = _saved_descriptors.popitem()
        os.dup2(saved, descriptor)
        os.close(saved)
