"""Reader of a JSON list, item by item: memory holds one item, however long the list is."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from typing import Any

from llm_training_toolkit.data.sources.document import UnreadableDocument

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_WHITE_SPACE = " \t\n\r"
_PEEKED_BYTES = 4096  # in which a list begins


def starts_json_list(stream: io.BufferedIOBase) -> bool:
    """Return whether the content begins like a JSON list; nothing is consumed."""
    assert isinstance(stream, io.BufferedReader)
    return stream.peek(_PEEKED_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def iter_json_list(stream: io.BufferedIOBase, address: str, max_bytes: int) -> Iterator[tuple[int, Any]]:
    """Yield the number (from 1) and the value of every item.

    Raises UnreadableDocument for what is not such a list, and for an item larger than `max_bytes` (about): where the
    next one begins is then unknown.
    """
    text = _TextWindow(stream, address, max_bytes)
    text.expect("[")
    number = 0
    while text.peek() != "]":
        if number:
            text.expect(",")
        number += 1
        yield number, text.read_value(number)
    text.expect("]")
    if text.peek():
        raise text.build_error(number, "Extra data behind the list")


class _TextWindow:
    """Text of a stream from a position on; what lies before it is forgotten."""

    def __init__(self, stream: io.BufferedIOBase, address: str, max_bytes: int) -> None:
        self._stream, self._address, self._max_bytes = stream, address, max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._bytes, self._lines, self._number = 0, 1, 0

    def peek(self) -> str:
        """Return the next character that is not white space, empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITE_SPACE:
                self._at += 1
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def expect(self, character: str) -> None:
        """Pass a character. Raises UnreadableDocument for another one."""
        found = self.peek()
        if found != character:
            raise self.build_error(self._number, f"Expecting {character!r}, not {found or 'the end'!r}")
        self._at += 1

    def read_value(self, number: int) -> Any:  # noqa: ANN401 - whatever JSON can say
        """Read an item, with more of the stream as long as it is incomplete."""
        self._number = number
        self.peek()
        while True:
            fault: Exception | None = None
            try:
                value, end = self._scan(self._text, self._at)
            except (ValueError, RecursionError) as error:
                fault, end = error, len(self._text)
            # A number at the end of the window may continue behind it.
            if fault is None and (end < len(self._text) or self._ended):
                self._at = end
                return value
            if fault is not None and (self._ended or len(self._text) - self._at > self._max_bytes):
                larger = "" if self._ended else f", or larger than {self._max_bytes / (1 << 20):,.1f} MiB"
                raise self.build_error(number, f"{str(fault).partition(': line')[0]}{larger}")
            self._read_more()

    def build_error(self, number: int, said: str) -> UnreadableDocument:
        """Build the error for an item that is not JSON."""
        where = f"{self._address}, record {max(number, 1)}"
        return UnreadableDocument(where, f"is not JSON ({said})", "invalid_json")

    def _read_more(self) -> None:
        """Double the window, so that a long item is scanned a few times only."""
        raw = self._stream.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        try:
            more = self._decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            line = self._lines + error.object.count(b"\n", 0, error.start)
            where = self._bytes - (len(error.object) - len(raw)) + error.start
            why = f"is not UTF-8 (byte 0x{error.object[error.start]:02x} at byte {where})"
            raise UnreadableDocument(f"{self._address}:{line}", why, "invalid_utf8") from error
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not raw
        self._bytes, self._lines = self._bytes + len(raw), self._lines + raw.count(b"\n")
