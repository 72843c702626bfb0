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
from typing import NamedTuple

_NAME = re.compile(r"(.+)\.(\d{15})")
_GROWING = re.compile(r"metrics\.jsonl|(?:eval/)?tb/.+|logs/.+|ledger/.+")
_EVENTS = "tfevents"
_HEAD = struct.Struct("<Q")
_AROUND = 16
"""Bytes of an event's record beside the event: its length and two checksums."""


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
