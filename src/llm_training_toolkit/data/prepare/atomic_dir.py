"""Directories that are complete or absent, whatever dies while they are built."""

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

_LOCK_NAME = ".building"
_STALE_SECONDS = 24 * 3600.0
"""Seconds after which a build of another machine counts as dead, if its lock is free: some shared file systems keep
the locks of each machine to itself."""


def build_atomic_dir(target: Path, build: Callable[[Path], None]) -> Path:
    """Return the directory `target`, built by `build(temporary directory)` unless it is there.

    The finished directory is renamed into place, so that it is whole or absent whatever dies, and of two processes
    that build the same one, the second's is thrown away.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        with _hold_build_lock(temporary) as claim:
            build(temporary)
            claim.unlink()
            _fsync_directory(temporary)
            temporary.rename(target)
    except OSError:  # another process was faster, and may have tidied away what this one was building from
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def remove_stale_builds(cache: Path) -> None:
    """Remove what killed builds have left in a cache and one and two directories below.

    Whoever builds holds a lock, which its system lets go of when it dies. Nothing else is touched.
    """
    for pattern in (".*", "*/.*", "*/.*/.*"):
        # Path.glob raises where a directory goes meanwhile.
        for name in iglob(f"{pattern}/{_LOCK_NAME}", root_dir=cache):  # noqa: PTH207
            _remove_if_stale(cache / name)


@contextmanager
def _hold_build_lock(directory: Path) -> Iterator[Path]:
    """Say in a file that the directory is being built, and hold its lock meanwhile."""
    claim = directory / _LOCK_NAME
    with claim.open("w") as file:
        with suppress(OSError):  # a file system without locks: nobody can see that the builder died, and nobody sweeps
            fcntl.flock(file, fcntl.LOCK_EX)
            # Written under the lock: a claim without a word is of somebody who is just about to hold it.
            file.write(socket.gethostname())
            file.flush()
        yield claim


def _remove_if_stale(claim: Path) -> None:
    with suppress(OSError), claim.open("r+") as file:  # gone meanwhile, held, or another user's
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        host = file.read()
        last = max(path.stat().st_mtime for path in claim.parent.iterdir())
        if host == socket.gethostname() or (host and time.time() - last > _STALE_SECONDS):
            shutil.rmtree(claim.parent, ignore_errors=True)


def _fsync_directory(directory: Path) -> None:
    """Make the files durable before the name that says they are complete."""
    for path in [*directory.iterdir(), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
