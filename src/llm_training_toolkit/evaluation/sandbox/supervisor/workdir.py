"""Working directory of a program, and removal of directories left by killed supervisors."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = "ltt-program-"
_MIN_AGE_SECONDS = 60.0  # a younger directory may not be locked yet


def create_workdir() -> str:
    """Create a directory, locked as long as this process or a fork of it lives."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    return folder


def remove_stale_workdirs() -> None:
    """Remove directories without a lock holder."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            _remove_unless_locked(folder)


def _remove_unless_locked(folder: Path) -> None:
    if time.time() - folder.stat().st_mtime < _MIN_AGE_SECONDS:
        return
    held = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(held)
