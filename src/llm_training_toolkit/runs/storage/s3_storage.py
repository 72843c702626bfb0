"""Run in an object store, with a staging directory for this process.

    Small files: fetched when the run is opened, uploaded when changed here.
    Append-only files: uploaded in segments (`append_log`); their end is fetched when read.
    Checkpoints: directories with a manifest here; fragments are uploaded when written, fetched when read.
    Export and base weights: uploaded whole, `training.json` last.
    Profiles: uploaded, not fetched.

Other code uses the staging directory like any run directory; only this module accesses the store.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.storage import append_log as segments
from llm_training_toolkit.runs.storage.append_log import AppendLogWriter
from llm_training_toolkit.runs.storage.lease import CLAIMS, is_lease_held
from llm_training_toolkit.runs.storage.s3_client import ObjectInfo, S3Client, StorageError

_MANIFEST = "manifest.json"
# Object beside the manifest of a quarantined checkpoint, because an object cannot be renamed.
_QUARANTINE_MARKER = "quarantine"
# Origin of an exported directory, uploaded last: without it the export counts as absent.
_EXPORT_INFO_FILE = "training.json"
_FIRST_ATTEMPT = "attempts/0001.json"
_ATTEMPT_RECORD = re.compile(r"attempts/\d+\.json")
_TAIL = 262_144  # bytes fetched from the end of an append-only file: more than `ltt runs` and a resume read
_LARGE = 4 << 20  # bytes from which a file is uploaded from disk, not through memory
_RETRY_TIMEOUT = 240.0  # seconds of retries for a checkpoint file that the store does not take
_RETRY_INTERVAL = 5.0  # seconds between two retries
_REFRESHES = 3  # listings of a run that is begun anew meanwhile; some stores list other ETags than they answer with


class RunReplacedError(StorageError):
    """Removal of the run from the store while this process worked on it; perhaps it was begun anew."""


class S3Storage:
    """Storage of one run in an object store (protocol `Storage`). Thread-safe."""

    def __init__(self, bucket: S3Client, path: Path) -> None:
        self.run, self.bucket = RunDirectory(path, self), bucket
        self._lock = threading.RLock()
        self._etags: dict[str, str] = {}
        self._run_id = ""  # of the first attempt that was seen; empty before there is one
        self._file_states: dict[str, tuple[int, int]] = {}
        self._stored_segments: dict[str, list[segments.LogSegment]] = {}
        self._append_logs = AppendLogWriter(bucket, path)
        path.mkdir(parents=True, exist_ok=True)

    def get_uri(self, path: Path) -> str:
        """Return the address, which is valid on every machine; of a path outside of the run the path."""
        if not path.is_relative_to(self.run.path):
            return str(path)
        relative = self._get_object_key(path)
        return self.bucket.address if relative == "." else f"{self.bucket.address}/{relative}"

    def is_held(self, run: Path) -> bool:  # noqa: ARG002 - this storage holds one run
        """Return whether a process holds the run's lease."""
        return is_lease_held(self.bucket)

    def refresh_directory(self, below: Path) -> None:
        """Fetch what other processes have written below a directory. Raises StorageError."""
        with self._lock:
            for _ in range(_REFRESHES):
                if self._refresh_once(below):
                    return

    def _refresh_once(self, below: Path) -> bool:
        """Fetch what changed; return False if the run was begun anew since the listing, with its old checkpoints."""
        prefix = "" if below == self.run.path else f"{self._get_object_key(below)}/"
        listed = self.bucket.list_objects(prefix)
        growing = segments.group_segments_by_file({key: stored.size for key, stored in listed.items()})
        for relative, found in growing.items():
            self._stored_segments[relative] = found
            self._append_logs.sync_stored_size(relative, segments.get_end_offset(found))
        if below in {self.run.path, self.run.checkpoints_dir}:
            self._refresh_checkpoints(listed)
        for key in [key for key in self._etags if key.startswith(prefix) and key not in listed]:
            self._drop_removed_file(key)
        for key, stored in listed.items():
            if self._is_small_file(key) and self._etags.get(key) != stored.etag:
                self._fetch_small_file(key)
        first = listed.get(_FIRST_ATTEMPT)
        return first is None or self._etags.get(_FIRST_ATTEMPT) == first.etag

    def _is_small_file(self, key: str) -> bool:
        """Return whether an object is fetched each time the run is opened."""
        top, _, name = key.rpartition("/")
        if key.startswith((CLAIMS, "checkpoints/")) or segments.is_append_only(key):
            return False
        return name == _EXPORT_INFO_FILE or not top.startswith(("export", "base", "profile"))

    def _refresh_checkpoints(self, listed: Mapping[str, ObjectInfo]) -> None:
        """Create the directories of existing checkpoints with their manifests; delete all others."""
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
        """Fetch the current version of a small file."""
        found = self.bucket.get_object(key)
        if found is None:
            return  # deleted since the listing
        path = self.run.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".{path.name}.{threading.get_ident()}")
        arriving.write_bytes(found.body)
        arriving.replace(path)
        self._etags[key], self._file_states[key] = found.etag, _read_file_state(path)
        self._run_id = self._run_id or _find_first_run_id(key, found.body)

    def _drop_removed_file(self, key: str) -> None:
        """Delete the copy of a small file that the store no longer has."""
        if self._is_small_file(key):
            (self.run.path / key).unlink(missing_ok=True)
            del self._etags[key]
            self._file_states.pop(key, None)

    def fetch_file(self, path: Path) -> None:
        """Fetch a file, or the end of an append-only one; the store may lack it."""
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
        """Fetch all files of an exported directory."""
        for key in self.bucket.list_objects(f"{self._get_object_key(directory)}/"):
            self.fetch_file(self.run.path / key)
            self._file_states[key] = _read_file_state(self.run.path / key)

    def flush(self, *, last: bool = False) -> None:
        """Upload files that changed here, in the order of their writes.

        Raises RunReplacedError if the run was removed or begun anew, StorageError.
        """
        with self._lock:
            self._check_identity()
            for path in self._list_local_files():
                relative = self._get_object_key(path)
                if segments.is_append_only(relative):
                    self._append_logs.upload_new_bytes(relative, last=last)
                elif self._file_states.get(relative) != _read_file_state(path):
                    self._upload_whole_file(path)

    def _list_local_files(self) -> list[Path]:
        """Return the files to upload, oldest first, without unfinished files and checkpoints."""
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
                with suppress(FileNotFoundError):  # its directory has just been replaced
                    found.append(((directory / name).stat().st_mtime_ns, directory / name))
        return [path for _, path in sorted(found)]

    def _upload_whole_file(self, path: Path) -> None:
        relative, state = self._get_object_key(path), _read_file_state(path)
        if path.name == _EXPORT_INFO_FILE:
            self._upload_export_files(path.parent)
        small = path.stat().st_size < _LARGE
        if _ATTEMPT_RECORD.fullmatch(relative):
            self._etags[relative] = self._put_attempt_record(relative, path.read_bytes())
        elif small:
            self._etags[relative] = self.bucket.put_object(relative, path.read_bytes())
        else:
            self._etags[relative] = self.bucket.upload_file(path, relative)
        self._file_states[relative] = state

    def _put_attempt_record(self, key: str, content: bytes) -> str:
        """Write the record of an attempt over one of the same run alone, and return the ETag.

        Driver and rank 0 both write it; it also identifies the run. Raises RunReplacedError, StorageError.
        """
        run_id = _read_run_id(content)
        etag = self.bucket.replace_own_object(
            key, content, self._etags.get(key), lambda found: len({_read_run_id(found), run_id} - {""}) <= 1
        )
        if etag is None:
            raise self._build_replaced_error()
        return etag

    def _check_identity(self) -> None:
        """Raise RunReplacedError if the store no longer holds the run that was opened. Raises StorageError."""
        if not self._run_id:
            return
        found = self.bucket.get_object(_FIRST_ATTEMPT)
        if found is None or _read_run_id(found.body) != self._run_id:
            raise self._build_replaced_error()

    def _build_replaced_error(self) -> RunReplacedError:
        return RunReplacedError(
            f"{self.bucket.address}: the run was removed while this process worked on it, and perhaps begun anew. "
            "This process stores nothing more; stop it"
        )

    def _upload_export_files(self, directory: Path) -> None:
        """Upload the other files of an exported directory, replacing an earlier export."""
        prefix = self._get_object_key(directory)
        self.bucket.delete_objects([f"{prefix}/{_EXPORT_INFO_FILE}"])
        sent = [path for path in directory.rglob("*") if path.is_file() and path.name != _EXPORT_INFO_FILE]
        for path in sent:
            self.bucket.upload_file(path, self._get_object_key(path))
        there = self.bucket.list_objects(f"{prefix}/")
        self.bucket.delete_objects(there.keys() - {self._get_object_key(path) for path in sent})

    def claim_file(self, path: Path) -> bool:
        """Upload a new file by a conditional create; False if the store has one of that name. Raises StorageError."""
        key = self._get_object_key(path)
        with self._lock:
            self._check_identity()
            etag = self.bucket.put_object_if_absent(key, path.read_bytes())
            if etag is None:
                return False
            self._etags[key], self._file_states[key] = etag, _read_file_state(path)
            self._run_id = self._run_id or _find_first_run_id(key, path.read_bytes())
            return True

    def upload_checkpoint_file(self, path: Path, told: Callable[[int], None]) -> None:
        """Upload a checkpoint file and delete it here. Raises StorageError if the store does not take it in time.

        Metrics and logs of the steps before it are flushed first, so that a checkpoint has its whole history.
        """
        until = time.monotonic() + _RETRY_TIMEOUT
        while True:
            try:
                self.flush()
                self.bucket.upload_file(path, self._get_object_key(path), told)
                break
            except RunReplacedError:
                raise
            except StorageError:
                if time.monotonic() > until:
                    raise
                time.sleep(_RETRY_INTERVAL)
        path.unlink()

    def commit_manifest(self, path: Path, text: str) -> None:
        """Write a checkpoint's manifest, which commits it. Raises RunReplacedError, StorageError, FileExistsError."""
        self._check_identity()
        mark = self.bucket.put_object_if_absent(self._get_object_key(path), text.encode())
        if mark is None:
            raise FileExistsError(f"{self.get_uri(path)}: another process has written one")
        write_atomically(path, text)
        self._etags[self._get_object_key(path)] = mark

    def read_file_sizes(self, directory: Path) -> Mapping[str, int]:
        """Return the bytes of each file of a checkpoint in the store, by name."""
        prefix = f"{self._get_object_key(directory)}/"
        return {key.removeprefix(prefix): stored.size for key, stored in self.bucket.list_objects(prefix).items()}

    def delete_checkpoint(self, directory: Path) -> None:
        """Delete a checkpoint, its manifest first: if interrupted, it looks incomplete. Raises StorageError."""
        self._check_identity()
        prefix = f"{self._get_object_key(directory)}/"
        self.bucket.delete_objects([f"{prefix}{_MANIFEST}"])
        self.bucket.delete_objects(self.bucket.list_objects(prefix))
        self.bucket.abort_multipart_uploads(prefix)
        shutil.rmtree(directory, ignore_errors=True)

    def quarantine_checkpoint(self, directory: Path) -> str:
        """Mark a checkpoint as quarantined and return a text that says where it is. Raises StorageError."""
        self._check_identity()
        mark = f"{self._get_object_key(directory)}/{_QUARANTINE_MARKER}"
        self.bucket.put_object(mark, b"")
        shutil.rmtree(directory)
        return f"it stays where it is, marked by {self.bucket.address}/{mark}"

    def evict_checkpoint(self, directory: Path) -> None:
        """Delete the fetched files of a checkpoint except its manifest."""
        for path in directory.iterdir():
            if path.name != _MANIFEST:
                path.unlink()

    def _get_object_key(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()


def _find_first_run_id(key: str, content: bytes) -> str:
    """Return the run's id if the object is the record of the first attempt, else an empty text."""
    return _read_run_id(content) if key == _FIRST_ATTEMPT else ""


def _read_run_id(content: bytes) -> str:
    """Return the id in the record of an attempt; empty if there is none."""
    try:
        record = json.loads(content)
    except ValueError:
        return ""
    return str(record.get("run_id", "")) if isinstance(record, dict) else ""


def _read_file_state(path: Path) -> tuple[int, int]:
    """Return (mtime, size), which changes when the file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
