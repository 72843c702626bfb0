"""Staging directories: where a process keeps its part of a run that lies in an object store.

One for each process, below the directory for temporary files (TMPDIR), with the run's name. What processes left that
are gone is removed by the next one: the lock on a directory ends with the process that holds it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


def staging_root() -> Path:
    """Where this user's staging directories lie on this machine."""
    return Path(tempfile.gettempdir()) / f"llm-training-toolkit-{os.getuid()}"


@contextmanager
def staging_directory() -> Iterator[Path]:
    """An empty directory of this process, removed at the end."""
    root = staging_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_what_the_dead_left(root)
    path = Path(tempfile.mkdtemp(dir=root))
    try:
        with (path / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_what_the_dead_left(root: Path) -> None:
    for path in root.iterdir():
        with suppress(OSError), (path / _LOCK).open("r+") as lock:  # one without a lock is just being made
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
