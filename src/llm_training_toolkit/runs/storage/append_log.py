"""Append-only files in a store that cannot append: numbered segments, each named after its first byte.

    metrics.jsonl.000000000000000    bytes 0 to 4,095 of metrics.jsonl
    metrics.jsonl.000000000004096    everything written since

Many small segments are merged into one under the name of the first; readers skip the others until they are deleted.
Segments of TensorBoard files are event files themselves, cut between records, so that TensorBoard reads them from the
bucket.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.runs.storage.s3_client import S3Client, StorageError

_NAME = re.compile(r"(.+)\.(\d{15})")
_GROWING = re.compile(r"metrics\.jsonl|(?:eval/)?tb/.+|logs/.+|samples/.+")
_EVENTS = "tfevents"
_HEAD = struct.Struct("<Q")
_AROUND = 16  # bytes of a record beside the event: its length and two checksums
_MOST_COLLISIONS = 5  # segments of others at our offset; a process that was taken over writes one
_MOST_SEGMENTS = 50  # segments that are merged: a month of ten-second steps is 5,000 objects, not 260,000


class LogSegment(NamedTuple):
    """Segment of an append-only file."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the byte after the segment."""
        return self.start + self.size


def is_append_only(relative: str) -> bool:
    """Return whether a file of a run directory is only ever appended to."""
    return _GROWING.fullmatch(relative) is not None


def build_segment_key(relative: str, start: int) -> str:
    """Return the key of a file's segment that begins at byte `start`."""
    return f"{relative}.{start:015d}"


def group_segments_by_file(sizes: Mapping[str, int]) -> dict[str, list[LogSegment]]:
    """Group object sizes by key into segments of each file, in order, skipping those within an earlier one."""
    found: dict[str, list[LogSegment]] = {}
    for key in sorted(sizes):
        if (match := _NAME.fullmatch(key)) and is_append_only(match[1]):
            segments, segment = found.setdefault(match[1], []), LogSegment(int(match[2]), sizes[key])
            if segment.end > get_end_offset(segments) or not segments:
                segments.append(segment)
    return found


def get_end_offset(segments: Iterable[LogSegment]) -> int:
    """Return the number of bytes of the file that the segments hold."""
    return max((segment.end for segment in segments), default=0)


def select_tail_segments(segments: list[LogSegment], size: int) -> list[LogSegment]:
    """Return the last segments that together hold at least `size` bytes."""
    held, first = 0, len(segments)
    while first > 0 and held < size:
        first -= 1
        held += segments[first].size
    return segments[first:]


def count_complete_bytes(relative: str, content: bytes) -> int:
    """Count the bytes of complete records: TensorBoard events, or lines of other files."""
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
class _UploadState:
    """Bytes of a file in the store and here, where its beginning may be missing."""

    stored_bytes: int = 0
    local_bytes: int = 0
    small_starts: list[int] = field(default_factory=list)
    """Start offsets of the segments that this process uploaded since its last merge."""


class AppendLogWriter:
    """Writer of the append-only files of one staging directory."""

    def __init__(self, bucket: S3Client, root: Path) -> None:
        self._bucket, self._root = bucket, root
        self._files: dict[str, _UploadState] = {}

    def sync_stored_size(self, relative: str, stored: int) -> None:
        """Adopt the store's size of a file if it differs from the uploaded one: another process has written."""
        if relative not in self._files or self._files[relative].stored_bytes != stored:
            self.adopt_stored_size(relative, stored)

    def adopt_stored_size(self, relative: str, stored: int) -> None:
        """Set the store's size of a file, and treat all local bytes as uploaded."""
        path = self._root / relative
        self._files[relative] = _UploadState(stored, path.stat().st_size if path.exists() else 0)

    def upload_new_bytes(self, relative: str, *, last: bool) -> None:
        """Upload new complete records; with `last` also an unterminated line. Raises StorageError."""
        sent = self._files.setdefault(relative, _UploadState())
        with (self._root / relative).open("rb") as file:
            file.seek(sent.local_bytes)
            content = file.read()
        complete = count_complete_bytes(relative, content)
        if last and "tfevents" not in relative:
            complete = len(content)
        if complete == 0:
            return
        self._put_segment(relative, sent, content[:complete])
        sent.small_starts.append(sent.stored_bytes)
        sent.stored_bytes, sent.local_bytes = sent.stored_bytes + complete, sent.local_bytes + complete
        if len(sent.small_starts) >= _MOST_SEGMENTS:
            self._merge_segments(relative, sent)

    def _put_segment(self, relative: str, sent: _UploadState, content: bytes) -> None:
        """Append a segment, behind those of a process that was taken over and wrote its last rows late."""
        for _ in range(_MOST_COLLISIONS):
            key = build_segment_key(relative, sent.stored_bytes)
            if self._bucket.put_object_if_absent(key, content) is not None:
                return
            sizes = {key: stored.size for key, stored in self._bucket.list_objects(f"{relative}.").items()}
            sent.stored_bytes = get_end_offset(group_segments_by_file(sizes).get(relative, ()))
            sent.small_starts.clear()
        raise StorageError(f"{self._bucket.address}: another process writes {relative}")

    def _merge_segments(self, relative: str, sent: _UploadState) -> None:
        """Merge the small segments: overwrite the first with all of them, then delete the others."""
        first, *others = sent.small_starts
        with (self._root / relative).open("rb") as file:
            file.seek(sent.local_bytes - (sent.stored_bytes - first))
            content = file.read(sent.stored_bytes - first)
        self._bucket.put_object(build_segment_key(relative, first), content)
        self._bucket.delete_objects(build_segment_key(relative, start) for start in others)
        sent.small_starts.clear()
