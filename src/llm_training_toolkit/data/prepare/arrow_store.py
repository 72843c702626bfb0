"""Arrow files of the token cache, memory-mapped for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError

_TOKENS_PER_BATCH = 1 << 20
_ROWS_PER_BATCH = 1 << 16
_INDEX_COLUMNS = ("source", "document", "batch", "start", "length", "targets")
_TOKEN_SCHEMA = pa.schema([("token", pa.uint32()), ("loss", pa.bool_())])


def write_columns(path: Path, columns: Mapping[str, Any]) -> None:
    """Write columns of equal length as one Arrow record batch. Arrays keep their types; Arrow infers those of lists."""
    batch = pa.record_batch([pa.array(values) for values in columns.values()], names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_columns(path: Path) -> dict[str, NDArray[Any]]:
    """Read columns of numbers as read-only arrays on the memory-mapped file."""
    batch = _open_arrow_file(path).get_batch(0)
    return {name: column.to_numpy() for name, column in zip(batch.schema.names, batch.columns, strict=True)}


def write_rows(path: Path, schema: Any, rows: Iterable[tuple[Any, ...]]) -> None:  # noqa: ANN401 - pyarrow is untyped
    """Write rows from an iterator in record batches, for tables larger than memory."""
    following = iter(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while batch := list(islice(following, _ROWS_PER_BATCH)):
            columns = zip(zip(*batch, strict=True), schema.types, strict=True)
            writer.write_batch(pa.record_batch([pa.array(values, kind) for values, kind in columns], schema=schema))


def read_column(path: Path, column: str) -> Any:  # noqa: ANN401 - pyarrow carries no types
    """Read a column of any type as an Arrow array; the file is memory-mapped."""
    return _open_arrow_file(path).read_all().column(column)


def read_array(path: Path, column: str) -> NDArray[Any]:
    """Read a column of numbers as an array (rows,), or of bytes of one width as (rows, width) uint8."""
    column_of_rows = read_column(path, column)
    kind = column_of_rows.type
    if not pa.types.is_fixed_size_binary(kind):
        values: NDArray[Any] = column_of_rows.to_numpy()
        return values
    blocks = [
        np.frombuffer(chunk.buffers()[1], np.uint8).reshape(-1, kind.byte_width)[chunk.offset :][: len(chunk)]
        for chunk in column_of_rows.chunks
    ]
    return np.concatenate([np.empty((0, kind.byte_width), np.uint8), *blocks])


def _open_arrow_file(path: Path) -> Any:  # noqa: ANN401 - pyarrow carries no types
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)))
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{path}: the prepared data is damaged ({error}). Remove the directory {path.parent} and run `ltt prepare`."
        ) from error
    except OSError as error:
        raise DataError(f"{path}: the prepared data cannot be read ({error}).") from error


class SourceExample(NamedTuple):
    """An example and the number of its source."""

    source: int
    example: Example


def write_examples(directory: Path, rendered: Iterable[SourceExample]) -> None:
    """Write examples from an iterator: `tokens.arrow` in batches of about a million tokens, `examples.arrow` as index.

    An example lies in one batch, so a reader sees it as one array.
    """
    index: list[tuple[int, ...]] = []
    tables: list[NDArray[np.int64]] = []
    pending: list[Example] = []
    filled = batches = 0
    with pa.OSFile(str(directory / "tokens.arrow"), "wb") as sink, pa.ipc.new_file(sink, _TOKEN_SCHEMA) as writer:
        for source, example in rendered:
            targets = int(np.count_nonzero(example.loss[1:]))
            index.append((source, example.document, batches, filled, len(example.tokens), targets))
            pending.append(example)
            filled += len(example.tokens)
            if filled >= _TOKENS_PER_BATCH:
                _flush_pending(writer, pending)
                tables.append(np.array(index, dtype=np.int64))
                index.clear()
                batches, filled = batches + 1, 0
        _flush_pending(writer, pending)
    table = np.concatenate([*tables, np.array(index, dtype=np.int64).reshape(-1, 6)])
    write_columns(directory / "examples.arrow", {name: table[:, i].copy() for i, name in enumerate(_INDEX_COLUMNS)})


def join_examples(directories: Sequence[Path], target: Path, transfer: Callable[[Path, Path], None]) -> None:
    """Join the examples of several directories, in their order, in the directory `target`.

    `transfer(file, new file)` links or copies the tokens; the index is rewritten with record batches renumbered.
    """
    tables, counts, total = [], [], 0
    for number, part in enumerate(directories):
        columns = read_columns(part / "examples.arrow")
        tables.append({**columns, "batch": columns["batch"] + total})
        counts.append(_open_arrow_file(part / "tokens.arrow").num_record_batches)
        total += counts[-1]
        transfer(part / "tokens.arrow", target / _format_part_name(number))
    empty = {name: np.zeros(0, dtype=np.int64) for name in _INDEX_COLUMNS}
    write_columns(
        target / "examples.arrow",
        {name: np.concatenate([table[name] for table in (empty, *tables)]) for name in _INDEX_COLUMNS},
    )
    write_columns(target / "parts.arrow", {"batches": np.array(counts, dtype=np.int64)})


def _format_part_name(number: int) -> str:
    return f"tokens-{number:05d}.arrow"


def _flush_pending(writer: Any, pending: list[Example]) -> None:  # noqa: ANN401 - pyarrow carries no types
    if pending:
        tokens = pa.array(np.concatenate([example.tokens for example in pending]), pa.uint32())
        loss = pa.array(np.concatenate([example.loss for example in pending]), pa.bool_())
        writer.write_batch(pa.record_batch([tokens, loss], schema=_TOKEN_SCHEMA))
        pending.clear()


class ExampleStore:
    """Memory-mapped examples of one rendering.

    source, document, length, targets (examples,) int64: source number, document number, tokens, and labels it yields.
    batch (examples,) int64: record batch, counted through all files; about a million tokens each.
    """

    def __init__(self, directory: Path) -> None:
        columns = read_columns(directory / "examples.arrow")
        self.source, self.document = columns["source"], columns["document"]
        self.length, self.targets = columns["length"], columns["targets"]
        self.batch, self._start = columns["batch"], columns["start"]
        self._ends = np.cumsum(read_columns(directory / "parts.arrow")["batches"])
        # A packing window spans a few files; each open file costs one of 1,024 descriptors.
        self._open = lru_cache(maxsize=16)(lambda part: _open_arrow_file(directory / _format_part_name(part)))
        self._read_batch = lru_cache(maxsize=64)(self._read_record_batch)

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.length)

    def __getitem__(self, number: int) -> Example:
        """Read one example; its tokens are a view of the file."""
        batch = self._read_batch(int(self.batch[number]))
        start, length = int(self._start[number]), int(self.length[number])
        tokens = batch.column(0).slice(start, length).to_numpy()
        loss = batch.column(1).slice(start, length).to_numpy(zero_copy_only=False)
        return Example(tokens, loss, int(self.document[number]))

    def _read_record_batch(self, number: int) -> Any:  # noqa: ANN401 - pyarrow carries no types
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self._open(part).get_batch(number - (int(self._ends[part - 1]) if part else 0))
