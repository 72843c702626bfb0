"""Files that grow, in a store that cannot append: numbered segments, each named after the byte it begins at. Pure.

    metrics.jsonl.000000000000000    bytes 0 to 4,095 of metrics.jsonl
    metrics.jsonl.000000000004096    what was written since

Many small ones are followed by one that holds them all, under the name of the first; a reader passes over those that
lie within it until they are deleted. Segments of TensorBoard's files are event files themselves, cut between records,
so that TensorBoard reads them from the bucket.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.runs.storage.s3_client import Bucket, StorageError

_NAME = re.compile(r"(.+)\.(\d{15})")
_GROWING = re.compile(r"metrics\.jsonl|(?:eval/)?tb/.+|logs/.+|ledger/.+")
_EVENTS = "tfevents"
_HEAD = struct.Struct("<Q")
_AROUND = 16
"""Bytes of an event's record beside the event: its length and two checksums."""
_MOST_SEGMENTS = 50
"""After so many they become one: a month in steps of ten seconds is five thousand objects, not 260,000."""


class Segment(NamedTuple):
    """A piece of a file that grows."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """The byte after it."""
        return self.start + self.size


def grows(relative: str) -> bool:
    """Whether a file of a run directory is written at its end alone."""
    return _GROWING.fullmatch(relative) is not None


def key_of(relative: str, start: int) -> str:
    """The key of the segment of a file that begins at a byte."""
    return f"{relative}.{start:015d}"


def by_file(sizes: Mapping[str, int]) -> dict[str, list[Segment]]:
    """The segments of each file that grows, in their order, without those within an earlier one; of keys and sizes."""
    found: dict[str, list[Segment]] = {}
    for key in sorted(sizes):
        if (match := _NAME.fullmatch(key)) and grows(match[1]):
            segments, segment = found.setdefault(match[1], []), Segment(int(match[2]), sizes[key])
            if segment.end > end_of(segments) or not segments:
                segments.append(segment)
    return found


def end_of(segments: Iterable[Segment]) -> int:
    """How many bytes of the file the segments hold."""
    return max((segment.end for segment in segments), default=0)


def tail(segments: list[Segment], size: int) -> list[Segment]:
    """The last segments, which hold at least so many bytes."""
    held, first = 0, len(segments)
    while first > 0 and held < size:
        first -= 1
        held += segments[first].size
    return segments[first:]


def whole(relative: str, content: bytes) -> int:
    """How many of the bytes are whole: events of TensorBoard, lines of other files."""
    if _EVENTS not in relative:
        return content.rfind(b"\n") + 1
    end = 0
    while end + _HEAD.size <= len(content):
        after = end + _AROUND + int(_HEAD.unpack_from(content, end)[0])
        if after > len(content):
            break
        end = after
    return end


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
        complete = whole(relative, content)
        if last and "tfevents" not in relative:
            complete = len(content)
        if complete == 0:
            return
        if self._bucket.create(key_of(relative, sent.stored), content[:complete]) is None:
            raise StorageError(f"{self._bucket.address}: another process writes {relative}")
        sent.small.append(sent.stored)
        sent.stored, sent.here = sent.stored + complete, sent.here + complete
        if len(sent.small) >= _MOST_SEGMENTS:
            self._merge(relative, sent)

    def _merge(self, relative: str, sent: _Sent) -> None:
        """Make the small segments one: first it takes the place of the first, then the others go."""
        first, *others = sent.small
        with (self._root / relative).open("rb") as file:
            file.seek(sent.here - (sent.stored - first))
            content = file.read(sent.stored - first)
        self._bucket.put(key_of(relative, first), content)
        self._bucket.delete(key_of(relative, start) for start in others)
        sent.small.clear()
