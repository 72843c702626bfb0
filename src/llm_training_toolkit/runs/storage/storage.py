"""Storage of a run: a local disk, or an object store with a staging directory for this process.

All differences between the two are here; other code works on directories.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from llm_training_toolkit.runs.atomic_write import sync_directory, write_atomically


class Storage(Protocol):
    """Operations on the storage of a run. Raises OSError if storage fails."""

    def get_uri(self, path: Path) -> str:
        """Return the location of a file or directory of the run, valid on every machine."""

    def is_held(self, run: Path) -> bool:
        """Return whether a process holds the lock or lease of the run in a directory."""

    def refresh_directory(self, below: Path) -> None:
        """Fetch what other processes have written below a directory."""

    def fetch_file(self, path: Path) -> None:
        """Fetch a file before it is read."""

    def flush(self, *, last: bool = False) -> None:
        """Upload everything written here."""

    def claim_file(self, path: Path) -> bool:
        """Publish a new file; False if another process has published one of that name."""

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

    def get_uri(self, path: Path) -> str:
        """Return the path."""
        return str(path)

    def is_held(self, run: Path) -> bool:
        """Return whether the lock is held; it ends with its process."""
        try:
            with (run / "lock").open() as lock:
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

    def claim_file(self, path: Path) -> bool:  # noqa: ARG002 - nothing is left to do
        """Return True: the file system has refused a second exclusive create."""
        return True

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Do nothing: the file system is shared."""

    def commit_manifest(self, path: Path, text: str) -> None:
        """Sync the names of the checkpoint's files and directories, write under a temporary name, then rename."""
        for directory in path.parents[:3]:  # checkpoint, checkpoints, run
            sync_directory(directory)
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
        """Do nothing: files on a disk are the originals."""
