"""Where a run lies: on a disk, or in a store of which this process has a staging directory.

What differs between the two is here; everything else works on directories and need not know.
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
    """What is asked of the place where a run lies. Raises OSError as storage does."""

    def get_uri(self, path: Path) -> str:
        """Where a file or directory of the run lies for everybody."""

    def is_held(self) -> bool:
        """Whether a process holds the run's claim."""

    def refresh_directory(self, below: Path) -> None:
        """See what others have written below a directory."""

    def fetch_file(self, path: Path) -> None:
        """Have a file here that is to be read."""

    def flush(self, *, last: bool = False) -> None:
        """Have everything there that was written here."""

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number."""

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Have a file of a checkpoint there that was written here; `told` of bytes."""

    def commit_manifest(self, path: Path, text: str) -> None:
        """Write the manifest of a checkpoint, which is complete from then on."""

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """Bytes of each file of a checkpoint, by name, as they are there."""

    def delete_checkpoint(self, directory: Path) -> None:
        """Delete a checkpoint. One whose deletion is cut short does not look whole."""

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Put a checkpoint where it is not found any more; where that is, in words."""

    def evict_checkpoint(self, directory: Path) -> None:
        """Forget what was brought of a checkpoint."""


class LocalStorage:
    """A run directory that every process sees as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_uri(self, path: Path) -> str:
        """Its path."""
        return str(path)

    def is_held(self) -> bool:
        """By the lock, which ends with its process."""
        try:
            with (self._path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except OSError:
            return False

    def refresh_directory(self, below: Path) -> None:
        """It is all there."""

    def fetch_file(self, path: Path) -> None:
        """It is there."""

    def flush(self, *, last: bool = False) -> None:
        """It is there."""

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """By an exclusive create."""
        return begin_attempt(RunDirectory(self._path), facts)

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """It is there."""

    def commit_manifest(self, path: Path, text: str) -> None:
        """Under a temporary name first, then renamed."""
        write_atomically(path, text)

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """As the file system says."""
        return {path.name: path.stat().st_size for path in directory.iterdir()}

    def delete_checkpoint(self, directory: Path) -> None:
        """The manifest first."""
        (directory / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(directory, ignore_errors=True)

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Renamed."""
        number = 1
        while (target := directory.with_name(f"left_behind_{number}_{directory.name}")).exists():
            number += 1
        directory.rename(target)
        return f"it lies in {target.name} now"

    def evict_checkpoint(self, directory: Path) -> None:
        """Nothing was brought."""


open_s3_storages: list[S3Storage] = []
"""Those that this process has open (`storage.opening`)."""


def find_storage(path: Path) -> Storage:
    """The place of the run that a path belongs to, or of the run at the path."""
    found = next((mirror for mirror in open_s3_storages if path.is_relative_to(mirror.run.path)), None)
    return found or LocalStorage(path)
