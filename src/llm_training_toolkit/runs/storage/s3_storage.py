"""A run in an object store, and this process's part of it in a staging directory.

    small files        fetched when the run is opened, sent again when they have changed here
    growing files      sent in segments (`segments`); of those in the store the end is fetched where it is read
    checkpoints        here as directories with a manifest; fragments are sent when written, fetched when read
    export, base       sent whole, the file that says what they are last

Everything below works on the staging directory as on any run directory; this alone knows the store.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_training_toolkit.runs.attempts import begin_attempt
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name, write_atomically
from llm_training_toolkit.runs.storage import append_log as segments
from llm_training_toolkit.runs.storage.append_log import AppendLogWriter
from llm_training_toolkit.runs.storage.lease import CLAIMS, is_lease_held
from llm_training_toolkit.runs.storage.s3_client import ObjectInfo, S3Client, StorageError

_MANIFEST = "manifest.json"
_QUARANTINE_MARKER = "left_behind"
"""Beside the manifest of a checkpoint that the lineage has left: an object cannot be renamed."""
_EXPORT_INFO_FILE = "training.json"
"""The file of an exported directory that says what it is of: without it the directory is not there."""
_TAIL = 262_144
"""Bytes of a growing file's end that are fetched: what `ltt runs` and a resume read, and more."""
_LARGE = 4 << 20
"""Bytes from which a file is sent from disk, not through memory."""
_RETRY_TIMEOUT = 240.0
"""Seconds that a checkpoint's file is tried again for, where the store does not take it."""
_RETRY_INTERVAL = 5.0
"""Seconds between two of these tries."""


class S3Storage:
    """One run in a store; as `Storage` in `storage.place` says. Safe to use from several threads."""

    def __init__(self, bucket: S3Client, path: Path) -> None:
        self.run, self.bucket = RunDirectory(path), bucket
        self._lock = threading.RLock()
        self._etags: dict[str, str] = {}
        self._file_states: dict[str, tuple[int, int]] = {}
        self._stored_segments: dict[str, list[segments.LogSegment]] = {}
        self._append_logs = AppendLogWriter(bucket, path)
        path.mkdir(parents=True, exist_ok=True)

    def get_uri(self, path: Path) -> str:
        """Where it lies for everybody."""
        relative = self._get_object_key(path)
        return self.bucket.address if relative == "." else f"{self.bucket.address}/{relative}"

    def is_held(self) -> bool:
        """Whether somebody works on the run."""
        return is_lease_held(self.bucket)

    def refresh_directory(self, below: Path) -> None:
        """Fetch what others have written below a directory since. Raises StorageError."""
        prefix = "" if below == self.run.path else f"{self._get_object_key(below)}/"
        with self._lock:
            listed = self.bucket.list_objects(prefix)
            growing = segments.group_segments_by_file({key: stored.size for key, stored in listed.items()})
            for relative, found in growing.items():
                self._stored_segments[relative] = found
                self._append_logs.sync_stored_size(relative, segments.get_end_offset(found))
            if below in {self.run.path, self.run.checkpoints_dir}:
                self._refresh_checkpoints(listed)
            for key, stored in listed.items():
                if self._is_small_file(key) and self._etags.get(key) != stored.etag:
                    self._fetch_small_file(key)

    def _is_small_file(self, key: str) -> bool:
        """Whether an object is a file that everybody who opens the run wants."""
        top, _, name = key.rpartition("/")
        if key.startswith((CLAIMS, "checkpoints/")) or segments.is_append_only(key):
            return False
        return name == _EXPORT_INFO_FILE or not top.startswith(("export", "base"))

    def _refresh_checkpoints(self, listed: Mapping[str, ObjectInfo]) -> None:
        """Make the directories of the checkpoints there are, with their manifests, and no others."""
        found: dict[str, dict[str, ObjectInfo]] = {}
        for key, stored in listed.items():
            top, _, rest = key.partition("/")
            name, _, file = rest.partition("/")
            if top == "checkpoints" and parse_checkpoint_name(Path(name)):
                found.setdefault(name, {})[file] = stored
        for name, files in found.items():
            directory = self.run.checkpoints_dir / name
            if _QUARANTINE_MARKER in files:
                shutil.rmtree(directory, ignore_errors=True)
            elif _MANIFEST not in files:
                directory.mkdir(parents=True, exist_ok=True)
            elif self._etags.get(f"checkpoints/{name}/{_MANIFEST}") != files[_MANIFEST].etag:
                self._fetch_small_file(f"checkpoints/{name}/{_MANIFEST}")
        for manifest in list(self.run.checkpoints_dir.glob(f"*/{_MANIFEST}")):
            if _MANIFEST not in found.get(manifest.parent.name, {}):
                shutil.rmtree(manifest.parent, ignore_errors=True)

    def _fetch_small_file(self, key: str) -> None:
        """Have a small file here as it is in the store now."""
        found = self.bucket.get_object(key)
        if found is None:
            return  # gone since it was listed
        path = self.run.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".{path.name}.{threading.get_ident()}")
        arriving.write_bytes(found.body)
        arriving.replace(path)
        self._etags[key], self._file_states[key] = found.etag, _read_file_state(path)

    def fetch_file(self, path: Path) -> None:
        """Have a file here: whole, or of one that grows its end. Nothing where the store has none of it."""
        relative = self._get_object_key(path)
        if segments.is_append_only(relative):
            self._fetch_tail(relative)
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving = path.with_name(f".{path.name}.{threading.get_ident()}")
            try:
                self.bucket.download_file(relative, arriving)
                arriving.replace(path)
            except FileNotFoundError:
                return
            finally:
                arriving.unlink(missing_ok=True)

    def _fetch_tail(self, relative: str) -> None:
        with self._lock:
            pieces = segments.select_tail_segments(self._stored_segments.get(relative, []), _TAIL)
            contents = [self.bucket.get_object(segments.build_segment_key(relative, piece.start)) for piece in pieces]
            if contents:
                path = self.run.path / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"".join(content.body for content in contents if content is not None))
                self._append_logs.adopt_stored_size(relative, pieces[-1].end)

    def fetch_directory(self, directory: Path) -> None:
        """Have all files of an exported directory here."""
        for key in self.bucket.list_objects(f"{self._get_object_key(directory)}/"):
            self.fetch_file(self.run.path / key)
            self._file_states[key] = _read_file_state(self.run.path / key)

    def flush(self, *, last: bool = False) -> None:
        """Send what has changed here, in the order in which it was written. Raises StorageError."""
        with self._lock:
            for path in self._list_local_files():
                relative = self._get_object_key(path)
                if segments.is_append_only(relative):
                    self._append_logs.upload_new_bytes(relative, last=last)
                elif self._file_states.get(relative) != _read_file_state(path):
                    self._upload_whole_file(path)

    def _list_local_files(self) -> list[Path]:
        """What this process has here to be sent, oldest first: not what is being written, nor checkpoints."""
        found: list[tuple[int, Path]] = []
        for where, directories, names in os.walk(self.run.path):
            directory = Path(where)
            if directory == self.run.path:
                directories[:] = [
                    name for name in directories if name not in {"checkpoints", self.run.task_export_dir.name}
                ]
            directories[:] = [name for name in directories if not name.startswith(".")]
            shown = (
                {_EXPORT_INFO_FILE}
                if _EXPORT_INFO_FILE in names
                else {name for name in names if not name.startswith(".")}
            )
            for name in shown:
                with suppress(FileNotFoundError):  # what it stood in has just been replaced
                    found.append(((directory / name).stat().st_mtime_ns, directory / name))
        return [path for _, path in sorted(found)]

    def _upload_whole_file(self, path: Path) -> None:
        relative, state = self._get_object_key(path), _read_file_state(path)
        if path.name == _EXPORT_INFO_FILE:
            self._upload_export_files(path.parent)
        small = path.stat().st_size < _LARGE
        self._etags[relative] = (
            self.bucket.put_object(relative, path.read_bytes()) if small else self.bucket.upload_file(path, relative)
        )
        self._file_states[relative] = state

    def _upload_export_files(self, directory: Path) -> None:
        """Send the other files of an exported directory, in place of those of an earlier one."""
        prefix = self._get_object_key(directory)
        self.bucket.delete_objects([f"{prefix}/{_EXPORT_INFO_FILE}"])
        sent = [path for path in directory.rglob("*") if path.is_file() and path.name != _EXPORT_INFO_FILE]
        for path in sent:
            self.bucket.upload_file(path, self._get_object_key(path))
        there = self.bucket.list_objects(f"{prefix}/")
        self.bucket.delete_objects(there.keys() - {self._get_object_key(path) for path in sent})

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number; of two that begin at the same moment each gets one of its own."""
        with self._lock:
            while True:
                self.refresh_directory(self.run.attempts_dir)
                number = begin_attempt(self.run, facts)
                path = self.run.attempts_dir / f"{number:04d}.json"
                mark = self.bucket.put_object_if_absent(self._get_object_key(path), path.read_bytes())
                if mark is not None:
                    self._etags[self._get_object_key(path)], self._file_states[self._get_object_key(path)] = (
                        mark,
                        _read_file_state(path),
                    )
                    return number
                path.unlink()

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Send a checkpoint's file and remove it here. Raises StorageError when the store does not take it in time.

        What belongs to the steps before it, metrics and logs, is sent first: a checkpoint has all that led to it.
        """
        until = time.monotonic() + _RETRY_TIMEOUT
        while True:
            try:
                self.flush()
                self.bucket.upload_file(path, self._get_object_key(path), told)
                break
            except StorageError:
                if time.monotonic() > until:
                    raise
                time.sleep(_RETRY_INTERVAL)
        path.unlink()

    def commit_manifest(self, path: Path, text: str) -> None:
        """Write a checkpoint's manifest, which is there from then on. Raises StorageError, FileExistsError."""
        mark = self.bucket.put_object_if_absent(self._get_object_key(path), text.encode())
        if mark is None:
            raise FileExistsError(f"{self.get_uri(path)}: another process has written one")
        write_atomically(path, text)
        self._etags[self._get_object_key(path)] = mark

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """Bytes of each file of a checkpoint, by name, as the store says."""
        prefix = f"{self._get_object_key(directory)}/"
        return {key.removeprefix(prefix): stored.size for key, stored in self.bucket.list_objects(prefix).items()}

    def delete_checkpoint(self, directory: Path) -> None:
        """Delete a checkpoint, its manifest first: a deletion that is cut short leaves none that looks whole."""
        prefix = f"{self._get_object_key(directory)}/"
        self.bucket.delete_objects([f"{prefix}{_MANIFEST}"])
        self.bucket.delete_objects(self.bucket.list_objects(prefix))
        self.bucket.abort_multipart_uploads(prefix)
        shutil.rmtree(directory, ignore_errors=True)

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Mark a checkpoint as one that the lineage leaves; where it is now, in words."""
        mark = f"{self._get_object_key(directory)}/{_QUARANTINE_MARKER}"
        self.bucket.put_object(mark, b"")
        shutil.rmtree(directory)
        return f"it stays where it is, marked by {self.bucket.address}/{mark}"

    def evict_checkpoint(self, directory: Path) -> None:
        """Remove what was fetched of a checkpoint but for its manifest."""
        for path in directory.iterdir():
            if path.name != _MANIFEST:
                path.unlink()

    def _get_object_key(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()


def _read_file_state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
