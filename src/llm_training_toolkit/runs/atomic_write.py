"""Atomic writes of small text files."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, leaves the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: ranks in identical containers share it and may write at the same time.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write alone does not name its file
        raise
    finally:
        temporary.unlink(missing_ok=True)  # exists only after a failure
    sync_directory(path.parent)


def create_directory(directory: Path) -> None:
    """Create a directory, with those above it, so that its name survives a power loss."""
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in created:
        with suppress(PermissionError):  # of a directory above that may be written, and not read
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power loss: new files, new directories and renames."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
