"""Sends what files have grown by: the writer's side of `segments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llm_training_toolkit.storage import segments
from llm_training_toolkit.storage.bucket import Bucket, StorageError

_MOST_SEGMENTS = 50
"""After so many they become one: a month in steps of ten seconds is five thousand objects, not 260,000."""


@dataclass
class _Sent:
    """How far a file is in the store, and how far that is here: its beginning may lie in the store alone."""

    stored: int = 0
    here: int = 0
    small: list[int] = field(default_factory=list)
    """Where the segments begin that this process sent since it made one of several."""


class Growing:
    """The growing files of one staging directory."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self._bucket, self._root = bucket, root
        self._files: dict[str, _Sent] = {}

    def look(self, relative: str, stored: int) -> None:
        """The store has so many bytes of a file; where that is more than was sent from here, another has written."""
        if relative not in self._files or self._files[relative].stored != stored:
            self.adopt(relative, stored)

    def adopt(self, relative: str, stored: int) -> None:
        """The store has so many bytes of a file, and of what is here none need be sent."""
        path = self._root / relative
        self._files[relative] = _Sent(stored, path.stat().st_size if path.exists() else 0)

    def send(self, relative: str, *, last: bool) -> None:
        """Send what is new and whole; at the `last` time a line without its end as well. Raises StorageError."""
        sent = self._files.setdefault(relative, _Sent())
        with (self._root / relative).open("rb") as file:
            file.seek(sent.here)
            content = file.read()
        whole = segments.whole(relative, content)
        if last and "tfevents" not in relative:
            whole = len(content)
        if whole == 0:
            return
        if self._bucket.create(segments.key_of(relative, sent.stored), content[:whole]) is None:
            raise StorageError(f"{self._bucket.address}: another process writes {relative}")
        sent.small.append(sent.stored)
        sent.stored, sent.here = sent.stored + whole, sent.here + whole
        if len(sent.small) >= _MOST_SEGMENTS:
            self._merge(relative, sent)

    def _merge(self, relative: str, sent: _Sent) -> None:
        """Make the small segments one: first it takes the place of the first, then the others go."""
        first, *others = sent.small
        with (self._root / relative).open("rb") as file:
            file.seek(sent.here - (sent.stored - first))
            content = file.read(sent.stored - first)
        self._bucket.put(segments.key_of(relative, first), content)
        self._bucket.delete(segments.key_of(relative, start) for start in others)
        sent.small.clear()
