"""Reads files of records, a few at a time: JSON lines, a JSON list, Parquet, Arrow."""

from __future__ import annotations

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

_BATCH_ROWS = 128
"""Rows that are Python objects at a time."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARROW_FILE_MAGIC = b"ARROW1"
"""What the file format begins with; the stream format begins with a length."""

ColumnSelector = Callable[[Sequence[str]], list[str]]
"""Which of the columns that a table has are needed; raises Unreadable where the needed ones are missing."""


class SourceRecord(NamedTuple):
    """One record: its number in the file, from 1 (for JSON lines the line), where it is in words, and its value."""

    number: int
    where: str
    value: Any


def read_source_records(
    file: SourceFile, kind: FileFormat, columns: ColumnSelector, first: int = 1
) -> Iterator[SourceRecord | UnreadableDocument]:
    """The records of a file in its order, from number `first` on; those that cannot be read as the reason why.

    Raises Unreadable where the file ends there: nothing after it can be read.
    """
    if kind is FileFormat.PARQUET or kind is FileFormat.ARROW:
        return _read_table_rows(file, kind, columns, first)
    return _read_json_records(file, kind, first)


def _read_json_records(file: SourceFile, kind: FileFormat, first: int) -> Iterator[SourceRecord | UnreadableDocument]:
    number = 0
    with open_decompressed(file) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
                if number == 1 and kind is FileFormat.JSON and line.lstrip().startswith(b"["):
                    yield from _parse_json_list(file, line + stream.read(), first)
                    return
                if number >= first:  # lines before it are not even parsed
                    yield from _parse_json_line(file, number, line)
        except READ_ERRORS as error:
            raise wrap_read_error(f"{file.display_path}:{number + 1}", error) from error


def _parse_json_line(file: SourceFile, number: int, line: bytes) -> Iterator[SourceRecord | UnreadableDocument]:
    if not line.strip():
        return
    where = f"{file.display_path}:{number}"
    try:
        yield SourceRecord(number, where, _parse_json(decode_utf8(line, file.display_path, number), where))
    except UnreadableDocument as error:
        yield error


def _parse_json_list(file: SourceFile, content: bytes, first: int) -> Iterator[SourceRecord]:
    values = _parse_json(decode_utf8(content, file.display_path), file.display_path)
    for number, value in enumerate(values[first - 1 :], start=first):
        yield SourceRecord(number, f"{file.display_path}, record {number}", value)


def _parse_json(text: str, where: str) -> Any:  # noqa: ANN401 - whatever JSON can say
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise UnreadableDocument(where, f"is not JSON ({error})", "invalid_json") from error


def decode_utf8(raw: bytes, address: str, first_line: int = 1) -> str:
    """Bytes as text. Raises Unreadable, naming the line, where they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        why = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start})"
        raise UnreadableDocument(f"{address}:{line}", why, "invalid_utf8") from error


def _read_table_rows(
    file: SourceFile, kind: FileFormat, columns: ColumnSelector, first: int
) -> Iterator[SourceRecord | UnreadableDocument]:
    if packed := get_compression_suffix(file.relative):
        raise UnreadableDocument(
            file.display_path, f"is {kind.value} compressed once more: undo its {packed}", "damaged"
        )
    with open_raw_file(file) as stream:
        # Mapped where it can be: a table of one batch may be larger than the memory.
        content = pa.memory_map(file.filesystem_path) if file.root.filesystem is None else stream
        table = pq.ParquetFile(content) if kind is FileFormat.PARQUET else None
        groups, number = _select_row_groups(table.metadata, first) if table else ([], 0)
        for batch in _read_parquet_batches(table, groups, columns) if table else _read_arrow_batches(content, columns):
            skipped = min(max(first - 1 - number, 0), batch.num_rows)
            number += skipped
            for start in range(skipped, batch.num_rows, _BATCH_ROWS):
                for row in _convert_rows(batch.slice(start, _BATCH_ROWS)):
                    number += 1
                    where = f"{file.display_path}, row {number}"
                    if isinstance(row, UnicodeDecodeError):
                        yield UnreadableDocument(
                            where, f"is not UTF-8 (byte 0x{row.object[row.start]:02x})", "invalid_utf8"
                        )
                    else:
                        yield SourceRecord(number, where, row)


def _convert_rows(rows: Any) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Rows as Python values; the error in place of one that is no text, which Parquet does not check."""
    try:
        yield from rows.to_pylist()
    except UnicodeDecodeError:
        for number in range(rows.num_rows):
            try:
                yield rows.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _select_row_groups(metadata: Any, first: int) -> tuple[list[int], int]:  # noqa: ANN401 - pyarrow is untyped
    """The row groups from the one that holds row number `first` on, and the rows before them."""
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
    begin = bisect_left(ends, first)
    return list(range(begin, len(ends))), ends[begin - 1] if begin else 0


def _read_parquet_batches(table: Any, groups: list[int], columns: ColumnSelector) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """The needed columns, a part of a row group at a time."""
    needed = _select_columns(columns, table.schema_arrow.names, lambda: table.metadata.num_rows)
    yield from table.iter_batches(_BATCH_ROWS, columns=needed, row_groups=groups)


def _read_arrow_batches(content: Any, columns: ColumnSelector) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """The needed columns, a record batch at a time, of both of Arrow's formats: files, and streams like `datasets`'."""
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
        error.count = rows()  # of a table without the column not one document is lost, but every row
        raise
