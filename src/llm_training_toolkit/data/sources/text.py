"""UTF-8 text of sources: decoding with the line of an invalid byte, and large files in pieces."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import NamedTuple

from llm_training_toolkit.data.sources.document import UnreadableDocument

_CONTINUATION = range(0x80, 0xC0)  # bytes of a UTF-8 character after its first


def decode_utf8(raw: bytes, address: str, first_line: int = 1, first_byte: int = 0) -> str:
    """Decode UTF-8. Raises UnreadableDocument naming the line of an invalid byte."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        why = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {first_byte + error.start})"
        raise UnreadableDocument(f"{address}:{line}", why, "invalid_utf8") from error


class FilePiece(NamedTuple):
    """Piece of a file: content, number of its first line (from 1) and first byte (from 0), and if it is all of it."""

    content: bytes
    first_line: int
    first_byte: int
    is_whole: bool


def iter_file_pieces(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[FilePiece]:
    """Yield the content in pieces of at most `max_bytes`: one, or cut after a line, or in a long line anywhere.

    A character is never cut. At most two pieces are in memory.
    """
    line, byte, pending = 1, 0, stream.read(max_bytes + 1)
    while len(pending) > max_bytes:
        end = _find_cut(pending, max_bytes)
        piece = pending[:end]
        yield FilePiece(piece, line, byte, is_whole=False)
        line, byte = line + piece.count(b"\n"), byte + end
        pending = pending[end:] + stream.read(end)
    yield FilePiece(pending, line, byte, is_whole=byte == 0)


def _find_cut(content: bytes, max_bytes: int) -> int:
    """Return the end of the last line in the second half, or else of the last whole character."""
    if (end := content.rfind(b"\n", max_bytes // 2, max_bytes) + 1) > 0:
        return end
    starts = (at for at in range(max_bytes, max(max_bytes - 4, 0), -1) if content[at] not in _CONTINUATION)
    return next(starts, max_bytes)
