"""Directories that are complete or absent, even if a process dies while building them."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import iglob
from pathlib import Path

from llm_training_toolkit.runs.atomic_write import create_directory, sync_directory

_LOCK_NAME = ".building"
# After this time a build of another machine counts as dead if its lock is free: some shared file systems keep locks
# local to each machine.
_STALE_SECONDS = 24 * 3600.0


def build_atomic_dir(target: Path, build: Callable[[Path], None]) -> Path:
    """Build the directory `target` with `build(temporary directory)` unless it exists, and return it.

    The finished directory is renamed into place, so it is complete or absent after any crash, and a loss of power later
    leaves it there. If two processes build the same directory, the second result is discarded.
    """
    if target.is_dir():
        return target
    create_directory(target.parent)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with _hold_build_lock(temporary) as claim:
            build(temporary)
            claim.unlink()
            _fsync_directory(temporary)
            temporary.rename(target)
            sync_directory(target.parent)
    except OSError as error:  # another process finished first and may have removed this build's inputs
        if not target.is_dir():
            error.filename = error.filename or str(target)  # a failed write alone does not name its file
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def remove_stale_builds(cache: Path) -> None:
    """Remove the leftovers of killed builds in a cache and up to two directory levels below.

    A builder holds a file lock, which the operating system releases when it dies. Everything else is kept.
    """
    for pattern in (".*", "*/.*", "*/.*/.*"):
        # Path.glob raises if a directory disappears meanwhile.
        for name in iglob(f"{pattern}/{_LOCK_NAME}", root_dir=cache):  # noqa: PTH207
            _remove_if_stale(cache / name)


@contextmanager
def _hold_build_lock(directory: Path) -> Iterator[Path]:
    """Create and hold the lock file that marks the directory as being built."""
    claim = directory / _LOCK_NAME
    with claim.open("w") as file:
        with suppress(OSError):  # file system without locks: a stale build is undetectable and stays
            fcntl.flock(file, fcntl.LOCK_EX)
            # Written under the lock: an empty file belongs to a builder that is about to take it.
            file.write(socket.gethostname())
            file.flush()
        yield claim


def _remove_if_stale(claim: Path) -> None:
    with suppress(OSError), claim.open("r+") as file:  # removed meanwhile, locked, or owned by another user
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        host = file.read()
        last = max(path.stat().st_mtime for path in claim.parent.iterdir())
        if host == socket.gethostname() or (host and time.time() - last > _STALE_SECONDS):
            shutil.rmtree(claim.parent, ignore_errors=True)


def _fsync_directory(directory: Path) -> None:
    """Make the files durable before the rename that marks them complete."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
