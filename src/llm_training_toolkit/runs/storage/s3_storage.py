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
from llm_training_toolkit.runs.directory import RunDirectory, checkpoint_place, write_atomically
from llm_training_toolkit.runs.storage import append_log as segments
from llm_training_toolkit.runs.storage.append_log import Growing
from llm_training_toolkit.runs.storage.lease import CLAIMS, is_held
from llm_training_toolkit.runs.storage.s3_client import Bucket, StorageError, Stored

_MANIFEST = "manifest.json"
_LEFT_BEHIND = "left_behind"
"""Beside the manifest of a checkpoint that the lineage has left: an object cannot be renamed."""
_TELLS = "training.json"
"""The file of an exported directory that says what it is of: without it the directory is not there."""
_TAIL = 262_144
"""Bytes of a growing file's end that are fetched: what `ltt runs` and a resume read, and more."""
_LARGE = 4 << 20
"""Bytes from which a file is sent from disk, not through memory."""
_PATIENCE = 240.0
"""Seconds that a checkpoint's file is tried again for, where the store does not take it."""
_PAUSE = 5.0
"""Seconds between two of these tries."""


class Mirror:
    """One run in a store; as `Storage` in `storage.place` says. Safe to use from several threads."""

    def __init__(self, bucket: Bucket, path: Path) -> None:
        self.run, self.bucket = RunDirectory(path), bucket
        self._lock = threading.RLock()
        self._marks: dict[str, str] = {}
        self._states: dict[str, tuple[int, int]] = {}
        self._stored: dict[str, list[segments.Segment]] = {}
        self._growing = Growing(bucket, path)
        path.mkdir(parents=True, exist_ok=True)

    def address(self, path: Path) -> str:
        """Where it lies for everybody."""
        relative = self._relative(path)
        return self.bucket.address if relative == "." else f"{self.bucket.address}/{relative}"

    def is_held(self) -> bool:
        """Whether somebody works on the run."""
        return is_held(self.bucket)

    def look(self, below: Path) -> None:
        """Fetch what others have written below a directory since. Raises StorageError."""
        prefix = "" if below == self.run.path else f"{self._relative(below)}/"
        with self._lock:
            listed = self.bucket.listed(prefix)
            growing = segments.by_file({key: stored.size for key, stored in listed.items()})
            for relative, found in growing.items():
                self._stored[relative] = found
                self._growing.look(relative, segments.end_of(found))
            if below in {self.run.path, self.run.checkpoints}:
                self._look_at_checkpoints(listed)
            for key, stored in listed.items():
                if self._is_small(key) and self._marks.get(key) != stored.mark:
                    self._fetch(key)

    def _is_small(self, key: str) -> bool:
        """Whether an object is a file that everybody who opens the run wants."""
        top, _, name = key.rpartition("/")
        if key.startswith((CLAIMS, "checkpoints/")) or segments.grows(key):
            return False
        return name == _TELLS or not top.startswith(("export", "base"))

    def _look_at_checkpoints(self, listed: Mapping[str, Stored]) -> None:
        """Make the directories of the checkpoints there are, with their manifests, and no others."""
        found: dict[str, dict[str, Stored]] = {}
        for key, stored in listed.items():
            top, _, rest = key.partition("/")
            name, _, file = rest.partition("/")
            if top == "checkpoints" and checkpoint_place(Path(name)):
                found.setdefault(name, {})[file] = stored
        for name, files in found.items():
            directory = self.run.checkpoints / name
            if _LEFT_BEHIND in files:
                shutil.rmtree(directory, ignore_errors=True)
            elif _MANIFEST not in files:
                directory.mkdir(parents=True, exist_ok=True)
            elif self._marks.get(f"checkpoints/{name}/{_MANIFEST}") != files[_MANIFEST].mark:
                self._fetch(f"checkpoints/{name}/{_MANIFEST}")
        for manifest in list(self.run.checkpoints.glob(f"*/{_MANIFEST}")):
            if _MANIFEST not in found.get(manifest.parent.name, {}):
                shutil.rmtree(manifest.parent, ignore_errors=True)

    def _fetch(self, key: str) -> None:
        """Have a small file here as it is in the store now."""
        found = self.bucket.get(key)
        if found is None:
            return  # gone since it was listed
        path = self.run.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f".{path.name}.{threading.get_ident()}")
        arriving.write_bytes(found.body)
        arriving.replace(path)
        self._marks[key], self._states[key] = found.mark, _state(path)

    def bring(self, path: Path) -> None:
        """Have a file here: whole, or of one that grows its end. Nothing where the store has none of it."""
        relative = self._relative(path)
        if segments.grows(relative):
            self._bring_tail(relative)
        elif not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            arriving = path.with_name(f".{path.name}.{threading.get_ident()}")
            try:
                self.bucket.download(relative, arriving)
                arriving.replace(path)
            except FileNotFoundError:
                return
            finally:
                arriving.unlink(missing_ok=True)

    def _bring_tail(self, relative: str) -> None:
        with self._lock:
            pieces = segments.tail(self._stored.get(relative, []), _TAIL)
            contents = [self.bucket.get(segments.key_of(relative, piece.start)) for piece in pieces]
            if contents:
                path = self.run.path / relative
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"".join(content.body for content in contents if content is not None))
                self._growing.adopt(relative, pieces[-1].end)

    def bring_directory(self, directory: Path) -> None:
        """Have all files of an exported directory here."""
        for key in self.bucket.listed(f"{self._relative(directory)}/"):
            self.bring(self.run.path / key)
            self._states[key] = _state(self.run.path / key)

    def send(self, *, last: bool = False) -> None:
        """Send what has changed here, in the order in which it was written. Raises StorageError."""
        with self._lock:
            for path in self._files():
                relative = self._relative(path)
                if segments.grows(relative):
                    self._growing.send(relative, last=last)
                elif self._states.get(relative) != _state(path):
                    self._send_whole(path)

    def _files(self) -> list[Path]:
        """What this process has here to be sent, oldest first: not what is being written, nor checkpoints."""
        found: list[tuple[int, Path]] = []
        for where, directories, names in os.walk(self.run.path):
            directory = Path(where)
            if directory == self.run.path:
                directories[:] = [
                    name for name in directories if name not in {"checkpoints", self.run.task_export.name}
                ]
            directories[:] = [name for name in directories if not name.startswith(".")]
            shown = {_TELLS} if _TELLS in names else {name for name in names if not name.startswith(".")}
            for name in shown:
                with suppress(FileNotFoundError):  # what it stood in has just been replaced
                    found.append(((directory / name).stat().st_mtime_ns, directory / name))
        return [path for _, path in sorted(found)]

    def _send_whole(self, path: Path) -> None:
        relative, state = self._relative(path), _state(path)
        if path.name == _TELLS:
            self._send_beside(path.parent)
        small = path.stat().st_size < _LARGE
        self._marks[relative] = (
            self.bucket.put(relative, path.read_bytes()) if small else self.bucket.upload(path, relative)
        )
        self._states[relative] = state

    def _send_beside(self, directory: Path) -> None:
        """Send the other files of an exported directory, in place of those of an earlier one."""
        prefix = self._relative(directory)
        self.bucket.delete([f"{prefix}/{_TELLS}"])
        sent = [path for path in directory.rglob("*") if path.is_file() and path.name != _TELLS]
        for path in sent:
            self.bucket.upload(path, self._relative(path))
        there = self.bucket.listed(f"{prefix}/")
        self.bucket.delete(there.keys() - {self._relative(path) for path in sent})

    def begin_attempt(self, facts: Mapping[str, Any]) -> int:
        """Take the next attempt number; of two that begin at the same moment each gets one of its own."""
        with self._lock:
            while True:
                self.look(self.run.attempts)
                number = begin_attempt(self.run, facts)
                path = self.run.attempts / f"{number:04d}.json"
                mark = self.bucket.create(self._relative(path), path.read_bytes())
                if mark is not None:
                    self._marks[self._relative(path)], self._states[self._relative(path)] = mark, _state(path)
                    return number
                path.unlink()

    def deliver(self, path: Path, told: Callable[[int], None]) -> None:
        """Send a checkpoint's file and remove it here. Raises StorageError when the store does not take it in time.

        What belongs to the steps before it, metrics and logs, is sent first: a checkpoint has all that led to it.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self.send()
                self.bucket.upload(path, self._relative(path), told)
                break
            except StorageError:
                if time.monotonic() > until:
                    raise
                time.sleep(_PAUSE)
        path.unlink()

    def publish(self, path: Path, text: str) -> None:
        """Write a checkpoint's manifest, which is there from then on. Raises StorageError, FileExistsError."""
        mark = self.bucket.create(self._relative(path), text.encode())
        if mark is None:
            raise FileExistsError(f"{self.address(path)}: another process has written one")
        write_atomically(path, text)
        self._marks[self._relative(path)] = mark

    def sizes(self, directory: Path) -> Mapping[str, int]:
        """Bytes of each file of a checkpoint, by name, as the store says."""
        prefix = f"{self._relative(directory)}/"
        return {key.removeprefix(prefix): stored.size for key, stored in self.bucket.listed(prefix).items()}

    def discard(self, directory: Path) -> None:
        """Delete a checkpoint, its manifest first: a deletion that is cut short leaves none that looks whole."""
        prefix = f"{self._relative(directory)}/"
        self.bucket.delete([f"{prefix}{_MANIFEST}"])
        self.bucket.delete(self.bucket.listed(prefix))
        self.bucket.abandon_uploads(prefix)
        shutil.rmtree(directory, ignore_errors=True)

    def leave_behind(self, directory: Path) -> str:
        """Mark a checkpoint as one that the lineage leaves; where it is now, in words."""
        mark = f"{self._relative(directory)}/{_LEFT_BEHIND}"
        self.bucket.put(mark, b"")
        shutil.rmtree(directory)
        return f"it stays where it is, marked by {self.bucket.address}/{mark}"

    def let_go(self, directory: Path) -> None:
        """Remove what was fetched of a checkpoint but for its manifest."""
        for path in directory.iterdir():
            if path.name != _MANIFEST:
                path.unlink()

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()


def _state(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size
