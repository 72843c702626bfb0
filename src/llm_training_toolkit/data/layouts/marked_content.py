"""Documents that a data set has already written with the markers of a layout, such as StarCoderData."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm_training_toolkit.data.types import MarkedText


class InvalidLayoutRecord(Exception):  # noqa: N818 - a finding that becomes an UnreadableDocument with its place
    """Error for a record without the fields of its layout: cause, and the `reason` to count it under."""

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.why, self.reason = why, reason


def split_marked_content(content: str, markers: Sequence[str]) -> tuple[MarkedText, ...]:
    """Split a text that begins with a marker at its markers; () for any other text.

    The content of StarCoderData's commits, issues and notebooks is such text: as plain text a model would read the
    letters of each marker instead of its token. Markers without text between them come before the same text.
    """
    if not content.startswith(tuple(markers)):
        return ()
    pieces = re.split(f"({'|'.join(map(re.escape, markers))})", content)[1:]
    segments: list[MarkedText] = []
    pending: list[str] = []
    for marker, text in zip(pieces[::2], pieces[1::2], strict=True):
        pending.append(marker)
        if text:
            segments.append(MarkedText(tuple(pending), text))
            pending = []
    return (*segments, MarkedText(tuple(pending), "")) if pending else tuple(segments)
