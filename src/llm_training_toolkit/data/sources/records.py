"""Reads files of records, a few at a time: JSON lines, a JSON list, Parquet, Arrow."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llm_training_toolkit.data.sources.decompress import DAMAGE, damaged, decompressed, opened
from llm_training_toolkit.data.sources.document import Unreadable
from llm_training_toolkit.data.sources.files import Kind, SourceFile, compression

_ROWS = 128
"""Rows that are Python objects at a time."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARROW_FILE = b"ARROW1"
"""What the file format begins with; the stream format begins with a length."""

Columns = Callable[[Sequence[str]], list[str]]
"""Which of the columns that a table has are needed; raises Unreadable where the needed ones are missing."""


class Record(NamedTuple):
    """One record: its number in the file, from 1 (for JSON lines the line), where it is in words, and its value."""

    number: int
    where: str
    value: Any


def records(file: SourceFile, kind: Kind, columns: Columns, first: int = 1) -> Iterator[Record | Unreadable]:
    """The records of a file in its order, from number `first` on; those that cannot be read as the reason why.

    Raises Unreadable where the file ends there: nothing after it can be read.
    """
    if kind is Kind.PARQUET or kind is Kind.ARROW:
        return _rows(file, kind, columns, first)
    return _json(file, kind, first)


def _json(file: SourceFile, kind: Kind, first: int) -> Iterator[Record | Unreadable]:
    number = 0
    with decompressed(file) as stream:
        try:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_BYTE_ORDER_MARK) if number == 1 else raw
                if number == 1 and kind is Kind.JSON and line.lstrip().startswith(b"["):
                    yield from _list(file, line + stream.read(), first)
                    return
                if number >= first:  # lines before it are not even parsed
                    yield from _line(file, number, line)
        except DAMAGE as error:
            raise damaged(f"{file.address}:{number + 1}", error) from error


def _line(file: SourceFile, number: int, line: bytes) -> Iterator[Record | Unreadable]:
    if not line.strip():
        return
    where = f"{file.address}:{number}"
    try:
        yield Record(number, where, _parsed(decoded(line, file.address, number), where))
    except Unreadable as error:
        yield error


def _list(file: SourceFile, content: bytes, first: int) -> Iterator[Record]:
    values = _parsed(decoded(content, file.address), file.address)
    for number, value in enumerate(values[first - 1 :], start=first):
        yield Record(number, f"{file.address}, record {number}", value)


def _parsed(text: str, where: str) -> Any:  # noqa: ANN401 - whatever JSON can say
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise Unreadable(where, f"is not JSON ({error})", "invalid_json") from error


def decoded(raw: bytes, address: str, first_line: int = 1) -> str:
    """Bytes as text. Raises Unreadable, naming the line, where they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        why = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start})"
        raise Unreadable(f"{address}:{line}", why, "invalid_utf8") from error


def _rows(file: SourceFile, kind: Kind, columns: Columns, first: int) -> Iterator[Record | Unreadable]:
    if packed := compression(file.relative):
        raise Unreadable(file.address, f"is {kind.value} compressed once more: undo its {packed}", "damaged")
    with opened(file) as stream:
        # Mapped where it can be: a table of one batch may be larger than the memory.
        content = pa.memory_map(file.location) if file.root.filesystem is None else stream
        table = pq.ParquetFile(content) if kind is Kind.PARQUET else None
        groups, number = _row_groups(table.metadata, first) if table else ([], 0)
        for batch in _parquet(table, groups, columns) if table else _arrow(content, columns):
            skipped = min(max(first - 1 - number, 0), batch.num_rows)
            number += skipped
            for start in range(skipped, batch.num_rows, _ROWS):
                for row in _values(batch.slice(start, _ROWS)):
                    number += 1
                    where = f"{file.address}, row {number}"
                    if isinstance(row, UnicodeDecodeError):
                        yield Unreadable(where, f"is not UTF-8 (byte 0x{row.object[row.start]:02x})", "invalid_utf8")
                    else:
                        yield Record(number, where, row)


def _values(rows: Any) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """Rows as Python values; the error in place of one that is no text, which Parquet does not check."""
    try:
        yield from rows.to_pylist()
    except UnicodeDecodeError:
        for number in range(rows.num_rows):
            try:
                yield rows.slice(number, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _row_groups(metadata: Any, first: int) -> tuple[list[int], int]:  # noqa: ANN401 - pyarrow is untyped
    """The row groups from the one that holds row number `first` on, and the rows before them."""
    ends = list(accumulate(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)))
    begin = bisect_left(ends, first)
    return list(range(begin, len(ends))), ends[begin - 1] if begin else 0


def _parquet(table: Any, groups: list[int], columns: Columns) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """The needed columns, a part of a row group at a time."""
    needed = _needed(columns, table.schema_arrow.names, lambda: table.metadata.num_rows)
    yield from table.iter_batches(_ROWS, columns=needed, row_groups=groups)


def _arrow(content: Any, columns: Columns) -> Iterator[Any]:  # noqa: ANN401 - pyarrow is untyped
    """The needed columns, a record batch at a time, of both of Arrow's formats: files, and streams like `datasets`'."""
    is_file = content.read(len(_ARROW_FILE)) == _ARROW_FILE
    content.seek(0)
    table = pa.ipc.open_file(content) if is_file else pa.ipc.open_stream(content)
    batches = map(table.get_batch, range(table.num_record_batches)) if is_file else iter(table)
    needed = _needed(columns, table.schema.names, lambda: sum(batch.num_rows for batch in batches))
    yield from (batch.select(needed) for batch in batches)


def _needed(columns: Columns, names: Sequence[str], rows: Callable[[], int]) -> list[str]:
    try:
        return columns(names)
    except Unreadable as error:
        error.count = rows()  # of a table without the column not one document is lost, but every row
        raise
