"""Storage of a run: a local disk, or an object store with a staging directory for this process.

All differences between the two are here; other code works on directories.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llm_training_toolkit.runs.attempts import begin_attempt
from llm_training_toolkit.runs.directory import RunDirectory, write_atomically
from llm_training_toolkit.runs.storage.s3_storage import S3Storage


class Storage(Protocol):
    """Operations on the storage of a run. Raises OSError if storage fails."""

    def get_uri(self, path: Path) -> str:
        """Return the location of a file or directory of the run, valid on every machine."""

    def is_held(self) -> bool:
        """Return whether a process holds the run's lock or lease."""

    def refresh_directory(self, below: Path) -> None:
        """Fetch what other processes have written below a directory."""

    def fetch_file(self, path: Path) -> None:
        """Fetch a file before it is read."""

    def flush(self, *, last: bool = False) -> None:
        """Upload everything written here."""

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number."""

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Upload a checkpoint file written here; `told` receives the bytes sent."""

    def commit_manifest(self, path: Path, text: str) -> None:
        """Write the manifest of a checkpoint, which commits it."""

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """Return the bytes of each stored file of a checkpoint, by name."""

    def delete_checkpoint(self, directory: Path) -> None:
        """Delete a checkpoint; after an interrupted deletion it does not look complete."""

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Hide a checkpoint from searches and return a text that says where it is."""

    def evict_checkpoint(self, directory: Path) -> None:
        """Delete the fetched files of a checkpoint."""


class LocalStorage:
    """Run directory on a file system that every process shares."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_uri(self, path: Path) -> str:
        """Return the path."""
        return str(path)

    def is_held(self) -> bool:
        """Return whether the lock is held; it ends with its process."""
        try:
            with (self._path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def refresh_directory(self, below: Path) -> None:
        """Do nothing: the file system is shared."""

    def fetch_file(self, path: Path) -> None:
        """Do nothing: the file system is shared."""

    def flush(self, *, last: bool = False) -> None:
        """Do nothing: the file system is shared."""

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the number by an exclusive create."""
        return begin_attempt(RunDirectory(self._path), facts)

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Do nothing: the file system is shared."""

    def commit_manifest(self, path: Path, text: str) -> None:
        """Write under a temporary name, then rename."""
        write_atomically(path, text)

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """Return the sizes in the file system."""
        return {path.name: path.stat().st_size for path in directory.iterdir()}

    def delete_checkpoint(self, directory: Path) -> None:
        """Delete the manifest first."""
        (directory / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Rename the directory."""
        number = 1
        while (target := directory.with_name(f"quarantine_{number}_{directory.name}")).exists():
            number += 1
        directory.rename(target)
        return f"it lies in {target.name} now"

    def evict_checkpoint(self, directory: Path) -> None:
        """Do nothing: no file was fetched."""


open_s3_storages: list[S3Storage] = []  # all that this process has open (`storage.open`)


def find_storage(path: Path) -> Storage:
    """Return the storage of the run at a path, or of the run that the path is in."""
    found = next((mirror for mirror in open_s3_storages if path.is_relative_to(mirror.run.path)), None)
    return found or LocalStorage(path)
