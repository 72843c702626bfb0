"""Sending what libraries print to a log file, below Python, so that the screen stays the person's."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO


def open_terminal_copy(descriptor: int) -> IO[str]:
    """A file on the present standard output (1) or error (2) that survives `redirect`."""
    return os.fdopen(os.dup(descriptor), "w", buffering=1, encoding="utf-8", errors="replace")


_END = 16_384
"""Bytes of a log's end that are looked at."""


def read_last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, without blank ones; none where there is no log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-count:]


_saved_descriptors: dict[int, int] = {}
"""Standard output and error as they were before the first `redirect`, under other numbers."""


def redirect_output(path: Path) -> None:
    """Send standard output and error of this process, and of its children from now on, to the end of a file."""
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
    """Undo every `redirect`."""
    sys.stdout.flush()
    sys.stderr.flush()
    while _saved_descriptors:
        descriptor, saved = _saved_descriptors.popitem()
        os.dup2(saved, descriptor)
        os.close(saved)
