"""Reader of record files in small batches: JSON lines, JSON lists, Parquet, Arrow."""

from __future__ import annotations

import io
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llm_training_toolkit.data.sources.decompress import READ_ERRORS, open_decompressed, open_raw_file, wrap_read_error
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import FileFormat, SourceFile, get_compression_suffix
from llm_training_toolkit.data.sources.json_list import BYTE_ORDER_MARK, iter_json_list, starts_json_list
from llm_training_toolkit.data.sources.text import decode_utf8

_PEEKED_BYTES = 1 << 10
_BATCH_ROWS = 128  # rows held as Python objects at a time
_PASSED_BYTES = 1 << 20  # read at a time of a line that is too long
_WHOLE_GROUP_BYTES = 1 << 28  # row groups of a store that are read as a whole
_PIECE_BYTES = 8 << 20  # of a table, decompressed at a time
_ARROW_FILE_MAGIC = b"ARROW1"  # first bytes of the file format; the stream format begins with a length

ColumnSelector = Callable[[Sequence[str]], list[str]]  # selects columns; raises UnreadableDocument if one is missing


class SourceRecord(NamedTuple):
    """Record: number in the file from 1 (the line for JSON lines), location for messages, and value."""

    number: int
    where: str
    value: Any


def read_source_records(
    file: SourceFile, kind: FileFormat, columns: ColumnSelector, first: int = 1, *, max_bytes: int
) -> Iterator[SourceRecord | UnreadableDocument]:
    """Yield the records of a file in order from number `first`; unreadable ones as UnreadableDocument.

    Records larger than `max_bytes` are unreadable, and never in memory as a whole if the file has lines.
    Raises UnreadableDocument if the rest of the file is unreadable.
    """
    if kind is FileFormat.PARQUET or kind is FileFormat.ARROW:
        return _read_table_rows(file, kind, columns, first, max_bytes)
    return _read_json_records(file, kind, first, max_bytes)


def build_size_error(where: str, size: int, max_bytes: int) -> UnreadableDocument:
    """Build the error for a record that is too large."""
    why = f"has {size / (1 << 20):,.1f} MiB, more than the {max_bytes / (1 << 20):,.1f} of max_document_mb"
    return UnreadableDocument(where, why, "too_large")


def _read_json_records(
    file: SourceFile, kind: FileFormat, first: int, max_bytes: int
) -> Iterator[SourceRecord | UnreadableDocument]:
    number = 0
    with open_decompressed(file) as stream:
        try:
            if kind is FileFormat.JSON and starts_json_list(stream):
                for number, value in iter_json_list(stream, file.display_path, max_bytes):
                    if number >= first:
                        yield SourceRecord(number, f"{file.display_path}, record {number}", value)
                return
            if kind is FileFormat.JSON and _starts_indented_object(stream):
                yield _read_whole_object(stream, file, max_bytes)
                return
            for number, (raw, size) in enumerate(_iter_lines(stream, max_bytes), start=1):
                line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
                if number < first:  # earlier lines are skipped unparsed
                    continue
                if size > max_bytes:
                    yield build_size_error(f"{file.display_path}:{number}", size, max_bytes)
                else:
                    yield from _parse_json_line(file, number, line)
        except READ_ERRORS as error:
            raise wrap_read_error(f"{file.display_path}:{number + 1}", error) from error


def _starts_indented_object(stream: io.BufferedIOBase) -> bool:
    """Return whether the first line is `{` alone, as of a trajectory file; nothing is consumed."""
    assert isinstance(stream, io.BufferedReader)
    head, newline, _ = stream.peek(_PEEKED_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip().partition(b"\n")
    return bool(newline) and head.strip() == b"{"


def _read_whole_object(
    stream: io.BufferedIOBase, file: SourceFile, max_bytes: int
) -> SourceRecord | UnreadableDocument:
    """Read a file that is one object, of at most `max_bytes`."""
    where = f"{file.display_path}, record 1"
    content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        return build_size_error(where, len(content), max_bytes)
    try:
        text = decode_utf8(content.removeprefix(BYTE_ORDER_MARK), file.display_path)
        return SourceRecord(1, where, _parse_json(text, where))
    except UnreadableDocument as error:
        return error


def _iter_lines(stream: io.BufferedIOBase, max_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield every line and its size; of a line above `max_bytes` only the beginning, the rest is read past."""
    while line := stream.readline(max_bytes + 1):
        size, more = len(line), line
        while size > max_bytes and not more.endswith(b"\n") and (more := stream.readline(_PASSED_BYTES)):
            size += len(more)
        yield line, size - line.endswith(b"\n") if size == max_bytes + 1 else size


def _parse_json_line(file: SourceFile, number: int, line: bytes) -> Iterator[SourceRecord | UnreadableDocument]:
    if not line.strip():
        return
    where = f"{file.display_path}:{number}"
    try:
        yield SourceRecord(number, where, _parse_json(decode_utf8(line, file.display_path, number), where))
    except UnreadableDocument as error:
        yield error


def _parse_json(text: str, where: str) -> Any:  # noqa: ANN401 - whatever JSON can say
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises a plain ValueError
        raise UnreadableDocument(where, f"is not JSON ({error})", "invalid_json") from error


def _read_table_rows(
    file: SourceFile, kind: FileFormat, columns: ColumnSelector, first: int, max_bytes: int
) -> Iterator[SourceRecord | UnreadableDocument]:
    if packed := get_compression_suffix(file.relative):
        raise UnreadableDocument(
            file.display_path, f"is {kind.value} compressed once more: undo its {packed}", "damaged"
        )
    with open_raw_file(file) as stream:
        # Memory-mapped if local: a table of one batch may be larger than the memory.
        content = pa.memory_map(file.filesystem_path) if file.root.filesystem is None else stream
        table = _open_parquet_file(content, in_memory=content is not stream) if kind is FileFormat.PARQUET else None
        groups, number = _select_row_groups(table.metadata, first) if table else ([], 0)
        for batch in _read_parquet_batches(table, groups, columns) if table else _read_arrow_batches(content, columns):
            skipped = min(max(first - 1 - number, 0), batch.num_rows)
            number += skipped
            for start in range(skipped, batch.num_rows, _BATCH_ROWS):
                for row in _convert_rows(batch.slice(start, _BATCH_ROWS), max_bytes):
                    number += 1
                    where = f"{file.display_path}, row {number}"
                    if isinstance(row, _OversizedRow):
                        yield build_size_error(where, row.size, max_bytes)
                    elif isinstance(row, UnicodeDecodeError):
                        yield UnreadableDocument(
                            where, f"is not UTF-8 (byte 0x{row.object[row.start]:02x})", "invalid_utf8"
                        )
                    else:
                        yield SourceRecord(number, where, row)


class _OversizedRow(NamedTuple):
    """Row of a table that is too large, and its bytes."""

    size: int


def _convert_rows(rows: Any, max_bytes: int) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Yield rows as Python values, an _OversizedRow, or the UnicodeDecodeError of text that Parquet did not check."""
    if _count_bytes(rows) > max_bytes:
        yield from (_convert_row(rows.slice(number, 1), max_bytes) for number in range(rows.num_rows))
        return
    try:
        yield from rows.to_pylist()
    except UnicodeDecodeError:
        yield from (_convert_row(rows.slice(number, 1), max_bytes) for number in range(rows.num_rows))


def _convert_row(row: Any, max_bytes: int) -> Any:  # noqa: ANN401 - pyarrow is untyped
    if (size := _count_bytes(row)) > max_bytes:
        return _OversizedRow(size)
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


def _count_bytes(rows: Any) -> int:  # noqa: ANN401 - pyarrow is untyped
    """Count the bytes of rows. A dictionary belongs to the whole table, so encoded columns count nothing."""
    return sum(column.nbytes for column in rows.columns if not pa.types.is_dictionary(column.type))


def _select_row_groups(metadata: Any, first: int) -> tuple[list[int], int]:  # noqa: ANN401 - pyarrow is untyped
    """Return the row groups from the one that holds row `first`, and the number of rows before them."""
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
    begin = bisect_left(ends, first)
    return list(range(begin, len(ends))), ends[begin - 1] if begin else 0


def _open_parquet_file(content: Any, *, in_memory: bool) -> Any:  # noqa: ANN401 - pyarrow is untyped
    """Open a Parquet file. Large column chunks of a store are read in pieces, which takes more requests."""
    table = pq.ParquetFile(content)
    groups = range(table.metadata.num_row_groups)
    largest = max((table.metadata.row_group(group).total_byte_size for group in groups), default=0)
    return table if in_memory or largest <= _WHOLE_GROUP_BYTES else pq.ParquetFile(content, buffer_size=_PIECE_BYTES)


def _read_parquet_batches(table: Any, groups: list[int], columns: ColumnSelector) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Yield the needed columns in batches within a row group, of fewer rows if these are large on average."""
    needed = _select_columns(columns, table.schema_arrow.names, lambda: table.metadata.num_rows)
    for group in groups:
        metadata = table.metadata.row_group(group)
        chunks = map(metadata.column, range(metadata.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.partition(".")[0] in needed)
        rows = _PIECE_BYTES * metadata.num_rows // max(size, 1)
        yield from table.iter_batches(min(max(rows, 1), _BATCH_ROWS), columns=needed, row_groups=[group])


def _read_arrow_batches(content: Any, columns: ColumnSelector) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Yield the needed columns by record batch, of Arrow files and Arrow streams (such as those of `datasets`)."""
    is_file = content.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    content.seek(0)
    table = pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content)
    batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)
    needed = _select_columns(columns, table.schema.names, lambda: sum(batch.num_rows for batch in batches))
    yield from (batch.select(needed) for batch in batches)


def _select_columns(columns: ColumnSelector, names: Sequence[str], rows: Callable[[], int]) -> list[str]:
    try:
        return columns(names)
    except UnreadableDocument as error:
        error.count = rows()  # a table without the column loses every row, not one document
        raise
