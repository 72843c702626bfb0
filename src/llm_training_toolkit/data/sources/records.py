"""Reader of record files in small batches: JSON lines, JSON lists, Parquet, Arrow."""

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

_BATCH_ROWS = 128  # rows held as Python objects at a time
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARROW_FILE_MAGIC = b"ARROW1"  # first bytes of the file format; the stream format begins with a length

ColumnSelector = Callable[[Sequence[str]], list[str]]  # selects columns; raises UnreadableDocument if one is missing


class SourceRecord(NamedTuple):
    """Record: number in the file from 1 (the line for JSON lines), location for messages, and value."""

    number: int
    where: str
    value: Any


def read_source_records(
    file: SourceFile, kind: FileFormat, columns: ColumnSelector, first: int = 1
) -> Iterator[SourceRecord | UnreadableDocument]:
    """Yield the records of a file in order from number `first`; unreadable ones as UnreadableDocument.

    Raises UnreadableDocument if the rest of the file is unreadable.
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
                if number >= first:  # earlier lines are skipped unparsed
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
    except (ValueError, RecursionError) as error:  # a number with thousands of digits raises a plain ValueError
        raise UnreadableDocument(where, f"is not JSON ({error})", "invalid_json") from error


def decode_utf8(raw: bytes, address: str, first_line: int = 1) -> str:
    """Decode UTF-8. Raises UnreadableDocument naming the line of an invalid byte."""
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
        # Memory-mapped if local: a table of one batch may be larger than the memory.
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
    """Yield rows as Python values, or the UnicodeDecodeError of invalid text, which Parquet does not check."""
    try:
        yield from rows.to_pylist()
    except UnicodeDecodeError:
        for number in range(rows.num_rows):
            try:
                yield rows.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _select_row_groups(metadata: Any, first: int) -> tuple[list[int], int]:  # noqa: ANN401 - pyarrow is untyped
    """Return the row groups from the one that holds row `first`, and the number of rows before them."""
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
    begin = bisect_left(ends, first)
    return list(range(begin, len(ends))), ends[begin - 1] if begin else 0


def _read_parquet_batches(table: Any, groups: list[int], columns: ColumnSelector) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Yield the needed columns in batches within a row group."""
    needed = _select_columns(columns, table.schema_arrow.names, lambda: table.metadata.num_rows)
    yield from table.iter_batches(_BATCH_ROWS, columns=needed, row_groups=groups)


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
