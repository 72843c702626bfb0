"""File access for sources: local or remote, plain or compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import SourceFile, get_compression_suffix
from llm_training_toolkit.data.sources.remote import translate_remote_errors

# A file that grows beyond both is taken for a decompression bomb: text compresses ten-fold, logs a hundred-fold.
_MAX_EXPANSION = 200
_WATCHED_FROM = 1 << 30  # bytes
_DECOMPRESSED_BLOCK = 1 << 18  # bytes decompressed at a time
_REMOTE_BLOCK = 8 << 20  # bytes per request to a store: with less, latency exceeds the transfer time


@contextmanager
def open_raw_file(file: SourceFile) -> Iterator[io.BufferedReader]:
    """Open the raw bytes of a file, seekable.

    Raises UnreadableDocument for a local file or content that cannot be read. Raises DataError if a store does not
    answer: skipping its documents would give different data at the next start.
    """
    try:
        with _open_raw_stream(file) as stream:
            yield stream
    except READ_ERRORS as error:
        raise wrap_read_error(file.display_path, error) from error


READ_ERRORS = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)  # reading, decompressing, parsing


@contextmanager
def open_decompressed(file: SourceFile) -> Iterator[io.BufferedIOBase]:
    """Open a file, decompressed according to its suffix.

    Raises the errors of `open_raw_file`, and UnreadableDocument while reading what expands like a decompression bomb.
    """
    how = get_compression_suffix(file.relative)
    with open_raw_file(file) as stream:
        if how is None:
            yield stream
            return
        watched = _WatchedStream(_wrap_in_decompressor(stream, how), stream, file.display_path)
        with io.BufferedReader(watched, _DECOMPRESSED_BLOCK) as content:
            yield content


def wrap_read_error(where: str, error: Exception) -> UnreadableDocument:
    """Return the UnreadableDocument for a file that cannot be read, or only in part."""
    # Content errors can be OSErrors, too, but have no errno.
    if isinstance(error, OSError) and error.errno is not None:
        return UnreadableDocument(where, f"cannot be read ({error.strerror or error})", "unreadable")
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return UnreadableDocument(where, f"is damaged or cut off ({said})", "damaged")


def _open_raw_stream(file: SourceFile) -> io.BufferedReader:
    if file.root.filesystem is None:
        return Path(file.filesystem_path).open("rb")
    with translate_remote_errors(file.display_path):
        inner = file.root.filesystem.open_input_file(file.filesystem_path)
    return io.BufferedReader(_RemoteStream(inner, file.display_path), _REMOTE_BLOCK)


def _wrap_in_decompressor(stream: io.BufferedReader, how: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
    if not stream.peek(1):  # an interrupted copy, which gzip reads as an empty text
        raise EOFError("Nothing is in it, not even the mark of a compressed file")
    match how:
        case ".gz":
            return gzip.GzipFile(fileobj=stream)
        case ".bz2":
            return bz2.BZ2File(stream)
        case ".xz":
            return lzma.LZMAFile(stream)
        case ".zst":
            # Arrow's decompressor: Python has zstd only since 3.14.
            return pa.CompressedInputStream(pa.PythonFile(stream), "zstd")
    raise AssertionError(how)


class _WatchedStream(io.RawIOBase):
    """Decompressed content, which raises UnreadableDocument if it grows out of proportion to what was compressed."""

    def __init__(self, content: Any, packed: io.BufferedReader, address: str) -> None:  # noqa: ANN401 - pyarrow is untyped
        self._content, self._packed, self._address = content, packed, address
        self._size = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - anything with a buffer
        data = self._content.read(len(buffer))
        buffer[: len(data)] = data
        self._size += len(data)
        if self._size > max(_WATCHED_FROM, _MAX_EXPANSION * self._packed.tell()):
            why = f"expands more than {_MAX_EXPANSION}-fold, to over {self._size >> 20:,} MiB: decompress it yourself"
            raise UnreadableDocument(self._address, f"{why} if that is meant", "damaged")
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._content.close()
        super().close()


class _RemoteStream(io.RawIOBase):
    """Remote file that raises DataError for store errors, so that they are not mistaken for damaged content."""

    def __init__(self, inner: Any, address: str) -> None:  # noqa: ANN401 - pyarrow is untyped
        self._inner, self._address = inner, address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401 - anything with a buffer
        with translate_remote_errors(self._address):
            data = self._inner.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with translate_remote_errors(self._address):
            position: int = self._inner.seek(offset, whence)
        return position

    def tell(self) -> int:
        position: int = self._inner.tell()
        return position

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
        super().close()
