"""Document reader for sources. Drops empty documents, duplicates and documents of the evaluation set."""

from __future__ import annotations

import sqlite3
import tempfile
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Literal

from llm_training_toolkit.config.source_config import QualityConfig, SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.chat.parse import format_missing_column
from llm_training_toolkit.data.git.history import read_history
from llm_training_toolkit.data.sources.decompress import open_decompressed
from llm_training_toolkit.data.sources.document import DocumentStats, UnreadableDocument, group_by_repository
from llm_training_toolkit.data.sources.fields import RecordReader
from llm_training_toolkit.data.sources.files import FileFormat, SourceFile, detect_file_format
from llm_training_toolkit.data.sources.find import list_source_files
from llm_training_toolkit.data.sources.layout_records import LayoutRecordReader
from llm_training_toolkit.data.sources.quality import find_quality_fault, is_licensed
from llm_training_toolkit.data.sources.records import read_source_records
from llm_training_toolkit.data.sources.text import decode_utf8, iter_file_pieces
from llm_training_toolkit.data.types import Document, content_hash
from llm_training_toolkit.errors import DataError

OnError = Literal["stop", "skip", "collect"]  # collect: skip, and count damaged files instead of raising

_SAMPLE_RECORDS = 300

# Reasons that make a whole record file unreadable, not a single record.
_WHOLE_FILE_REASONS = frozenset({"damaged", "unreadable", "invalid_json", "invalid_utf8"})


def read_source_documents(
    source: SourceConfig,
    index: int,
    *,
    on_error: OnError = "stop",
    tally: DocumentStats | None = None,
    seen: set[bytes] | None = None,
    evaluation: Collection[bytes] = frozenset(),
    find_fault: Callable[[Document], str | None] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a source, sorted by file name, then by line or row; repositories by name.

    Drops files and records that are white space or have a content hash in `evaluation`, documents with a hash in
    `seen`, and those for which `find_fault` has a reason. Counts them in `tally`. Raises DataError for a path without
    files and for an unresponsive store.
    Unreadable documents are counted with `on_error="skip"`, damaged record files too with "collect". With "stop", the
    first one raises DataError naming file and line or row.
    Stops after `source.limit` documents. Raises DataError for a filter that leaves nothing.
    """
    tally = DocumentStats() if tally is None else tally
    seen = set() if seen is None else seen
    for document in keep_duplicates(
        source, index, list_source_files(source), on_error=on_error, tally=tally, evaluation=evaluation
    ):
        if document.content_digest in seen:
            tally.dropped["duplicate"] += 1
            continue
        seen.add(document.content_digest)
        if find_fault is not None and (reason := find_fault(document)):
            tally.dropped[reason] += 1
            continue
        tally.kept += 1
        yield document
        if tally.kept == source.limit:
            return
    if tally.dropped["filtered"] and not tally.kept:
        raise _build_filter_error(source, tally)


def _build_filter_error(source: SourceConfig, tally: DocumentStats) -> DataError:
    wanted = ", ".join(f"{column}: {list(values)}" for column, values in (source.filter or {}).items())
    seen = "; ".join(
        f"{column} is {', '.join(f'{value} ({count:,})' for value, count in values.most_common(8))}"
        for column, values in tally.filter_values.items()
    )
    return DataError(
        f"data.sources: {redact_uri(source.path)!r}: the filter {{{wanted}}} leaves none of "
        f"{tally.dropped['filtered']:,} records "
        f"({seen or format_missing_column(next(iter(source.filter or {})), tally.filtered_columns)}). Correct the "
        "filter, or name its column under fields."
    )


def keep_duplicates(
    source: SourceConfig,
    index: int,
    found: list[SourceFile],
    *,
    on_error: OnError,
    tally: DocumentStats,
    evaluation: Collection[bytes] = frozenset(),
    begin: str = "",
) -> Iterator[Document]:
    """Yield the documents of `found` including duplicates, from the document named `begin` on.

    Repositories are always read from the first, because their files are in a different order.
    """
    pieces = _drop_unusable(
        _iter_readable_documents(source, index, found, on_error=on_error, tally=tally, begin=begin),
        source.quality,
        evaluation,
        tally,
    )
    yield from pieces if source.group_by == "file" else group_by_repository(pieces, source.max_document_bytes, tally)


def read_sample(source: SourceConfig, index: int, found: list[SourceFile], tally: DocumentStats) -> Iterator[Document]:
    """Yield the documents of the first records of some files, at most `_SAMPLE_RECORDS`; count faults in `tally`.

    Files of a repository come one by one. A damaged file is counted. Raises DataError for an unresponsive store.
    """
    if source.format == "git":
        commits = islice(read_history(source, index, tally), _SAMPLE_RECORDS)
        yield from _drop_unusable(_handle_unreadable(commits, "collect", tally), source.quality, (), tally)
        return
    reader = RecordReader.from_config(source)
    share = -(-_SAMPLE_RECORDS // max(len(found), 1))
    for file in found:
        pieces = _read_files([file], reader, index, tally, most=share)
        yield from _drop_unusable(_handle_unreadable(pieces, "collect", tally), source.quality, (), tally)


def iter_content_hashes(document: Document) -> Iterator[bytes]:
    """Yield the content hashes of a document and its files, for excluding it from training."""
    yield document.content_digest
    yield from (content_hash(part.text) for part in document.parts)


def _drop_unusable(
    pieces: Iterable[Document], quality: QualityConfig | None, evaluation: Collection[bytes], tally: DocumentStats
) -> Iterator[Document]:
    for piece in pieces:
        if not piece.text or piece.text.isspace():
            tally.dropped["empty"] += 1
        elif evaluation and piece.content_digest in evaluation:
            tally.dropped["in_eval"] += 1
        elif quality is not None and (reason := find_quality_fault(piece.text, quality)):
            tally.dropped[reason] += 1
        else:
            yield piece


def _iter_readable_documents(
    source: SourceConfig, index: int, found: list[SourceFile], *, on_error: OnError, tally: DocumentStats, begin: str
) -> Iterator[Document]:
    """Yield every readable file and record in order; raise DataError for unreadable ones or count them."""
    if source.format == "git":
        yield from _handle_unreadable(read_history(source, index, tally, begin), on_error, tally)
        return
    if source.group_by == "repository":
        found = sorted(found, key=lambda file: (file.repository, file.path))
        pieces = (
            _check_repository(piece, redact_uri(source.path))
            for piece in _read_files(found, RecordReader.from_config(source), index, tally)
        )
        yield from (sort_by_repository if _has_records(found) else iter)(_handle_unreadable(pieces, on_error, tally))
        return
    file_index, record = _locate_document(found, begin)
    begun = _read_files(found[file_index:], RecordReader.from_config(source), index, tally, first_record=record)
    yield from _handle_unreadable(begun, on_error, tally)


def _locate_document(found: list[SourceFile], name: str) -> tuple[int, int]:
    """Return the file index (`found` is sorted by name) and record number of a document, or (0, 1) if absent.

    Documents of a record file are named by file, colon and record number.
    """
    file, _, record = name.rpartition(":")
    for candidate, number in ((name, "1"), (file, record)):
        file_index = bisect_left(found, candidate, key=lambda each: each.name)
        if number.isdecimal() and file_index < len(found) and found[file_index].name == candidate:
            return file_index, int(number)
    return 0, 1


def _has_records(found: Iterable[SourceFile]) -> bool:
    return any(detect_file_format(file.relative, "code") is not FileFormat.WHOLE for file in found)


def _handle_unreadable(
    pieces: Iterable[Document | UnreadableDocument], on_error: str, tally: DocumentStats
) -> Iterator[Document]:
    for piece in pieces:
        if not isinstance(piece, UnreadableDocument):
            tally.read += 1
            yield piece
            continue
        if piece.ends_file and on_error != "collect":
            raise DataError(
                f"{piece}. What comes after it in this file is lost, and how much that is is not known: repair or "
                "remove the file; data.on_error: skip is for single documents."
            ) from piece
        if on_error == "stop":
            raise DataError(f"{piece}. Repair or remove it, or set data.on_error: skip.") from piece
        tally.add_fault(piece)


def _check_repository(piece: Document | UnreadableDocument, path: str) -> Document | UnreadableDocument:
    if isinstance(piece, UnreadableDocument) or piece.repository:
        return piece
    why = "belongs to no repository that is known, so group_by: repository has nowhere to put it"
    return UnreadableDocument(f"{path}: {piece.name}", why, "no_repository")


def _read_files(
    found: Iterable[SourceFile],
    reader: RecordReader,
    index: int,
    tally: DocumentStats,
    *,
    first_record: int = 1,
    most: int | None = None,
) -> Iterator[Document | UnreadableDocument]:
    """Yield the documents of some files, of each the first `most` records; the first file from `first_record` on."""
    for number, file in enumerate(found):
        try:
            yield from _read_file(file, reader, index, tally, (1 if number else first_record, most))
        except UnreadableDocument as error:
            error.ends_file = (
                detect_file_format(file.relative, reader.form) is not FileFormat.WHOLE
                and error.reason in _WHOLE_FILE_REASONS
            )
            yield error


def _read_file(
    file: SourceFile, reader: RecordReader, index: int, tally: DocumentStats, records: tuple[int, int | None]
) -> Iterator[Document | UnreadableDocument]:
    """Yield the documents of a file: of `records` = (first, number of them or None for all)."""
    kind, (first, most) = detect_file_format(file.relative, reader.form), records
    if kind is FileFormat.WHOLE:
        if reader.quality is not None and not is_licensed({}, reader.quality):
            tally.dropped["license"] += 1
            return
        yield from islice(_read_whole_file(file, reader, index, tally, first), most)
        return

    def select_columns(names: Sequence[str]) -> list[str]:
        return reader.select_columns(names, file.display_path)

    for record in islice(read_source_records(file, kind, select_columns, first, max_bytes=reader.max_bytes), most):
        if isinstance(record, UnreadableDocument):
            yield record
            continue
        if not reader.is_wanted(record):
            tally.add_filtered(record.value, reader.get_filter_values(record))
            continue
        if not reader.is_licensed(record):
            tally.dropped["license"] += 1
            continue
        try:
            yield reader.build_document(record, index, f"{file.name}:{record.number}")
        except UnreadableDocument as error:
            yield error


def _read_whole_file(
    file: SourceFile, reader: RecordReader, index: int, tally: DocumentStats, first: int
) -> Iterator[Document | UnreadableDocument]:
    """Yield a file as one document, or, if it is too large, cut into several, which are numbered like records."""
    if reader.form == "notebooks" and reader.layout and not (reader.named or reader.filter):
        yield _read_notebook_file(file, reader.layout, index, reader.max_bytes)
        return
    if reader.form not in {"code", "text"} or reader.named or reader.filter:
        raise UnreadableDocument(
            file.display_path, "holds no records (.jsonl, .json, .parquet, .arrow, .feather)", "no_records"
        )
    labels = ("", "") if reader.form == "text" else (file.repository, file.path)
    with open_decompressed(file) as stream:
        for number, piece in enumerate(iter_file_pieces(stream, reader.max_bytes), start=1):
            tally.cut += number == 2
            if number < first:
                continue
            try:
                text = decode_utf8(piece.content, file.display_path, piece.first_line, piece.first_byte)
            except UnreadableDocument as error:
                yield error
            else:
                yield Document(index, file.name if piece.is_whole else f"{file.name}:{number}", text, *labels)


def _read_notebook_file(file: SourceFile, layout: LayoutRecordReader, index: int, max_bytes: int) -> Document:
    """Read an .ipynb file, which cannot be cut. Raises UnreadableDocument if it is too large or no notebook."""
    with open_decompressed(file) as stream:
        content = stream.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnreadableDocument(
            file.display_path, f"has more than the {max_bytes / (1 << 20):,.1f} MiB of max_document_mb", "too_large"
        )
    text = decode_utf8(content, file.display_path)
    return layout.build_notebook(text, file.display_path, index, file.name, (file.repository, file.path))


def sort_by_repository(pieces: Iterable[Document]) -> Iterator[Document]:
    """Yield pieces sorted by repository, path and input order.

    Sorted on disk, in the directory for temporary files, because records of a repository may be far apart. Needs disk
    space for the whole source and constant memory.
    """
    with tempfile.TemporaryDirectory(prefix="ltt-") as folder, closing(_create_sort_table(Path(folder))) as table:
        rows = ((p.source, p.name, p.text.encode(), p.repository, p.path, p.stars) for p in pieces)
        try:
            table.executemany("INSERT INTO piece VALUES (?, ?, ?, ?, ?, ?)", rows)
            table.execute("CREATE INDEX place ON piece (repository, path)")
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{folder}: records cannot be sorted by repository there ({error}). Let TMPDIR name a directory with "
                "as much room as the records take when they are not compressed."
            ) from error
        for source, name, text, repository, path, stars in table.execute(
            "SELECT * FROM piece INDEXED BY place ORDER BY repository, path, rowid"
        ):
            yield Document(source, name, text.decode(), repository, path, stars)


def _create_sort_table(folder: Path) -> sqlite3.Connection:
    table = sqlite3.connect(folder / "pieces.db", isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
        table.execute(f"PRAGMA {setting}")
    table.execute("CREATE TABLE piece (source, name TEXT, text BLOB, repository TEXT, path TEXT, stars INTEGER)")
    table.execute("BEGIN")
    return table
