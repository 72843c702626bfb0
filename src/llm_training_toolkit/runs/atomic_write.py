"""Atomic writes of small text files."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, leaves the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: ranks in identical containers share it and may write at the same time.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # exists only after a failure
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make a rename survive a power loss, before anything older is deleted."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
