"""Reads the files of a source into documents, and drops what is empty, doubled or held out elsewhere."""

from __future__ import annotations

import sqlite3
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Literal

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.data.sources.decompress import decompressed
from llm_training_toolkit.data.sources.document import Tally, Unreadable
from llm_training_toolkit.data.sources.fields import columns_for, document_of
from llm_training_toolkit.data.sources.files import Format, Kind, SourceFile, kind_of
from llm_training_toolkit.data.sources.find import files
from llm_training_toolkit.data.sources.records import decoded, records
from llm_training_toolkit.data.types import Document, Part, content_hash
from llm_training_toolkit.errors import DataError

OnError = Literal["stop", "skip"]

_ENDINGS = frozenset({"damaged", "unreadable", "invalid_json", "invalid_utf8"})
"""Reasons why a file of records, not one of its records, cannot be read."""


def documents(
    source: Source,
    index: int,
    *,
    on_error: OnError = "stop",
    tally: Tally | None = None,
    seen: set[bytes] | None = None,
    evaluation: Collection[bytes] = frozenset(),
) -> Iterator[Document]:
    """Yield the documents of a source, sorted by file name, then by line or row; whole repositories by their name.

    Files and records of white space alone, those whose content hash is in `evaluation` and documents whose hash is
    already in `seen` are dropped and counted in `tally`. Raises DataError for a path that matches nothing, for a store
    that does not answer and, with `on_error="stop"`, for the first document that cannot be read, naming file and line
    or row; with "skip" those are counted.
    """
    tally = Tally() if tally is None else tally
    seen = set() if seen is None else seen
    for document in with_doubles(source, index, files(source), on_error=on_error, tally=tally, evaluation=evaluation):
        if document.digest in seen:
            tally.dropped["duplicate"] += 1
            continue
        seen.add(document.digest)
        tally.kept += 1
        yield document


def with_doubles(
    source: Source,
    index: int,
    found: list[SourceFile],
    *,
    on_error: OnError,
    tally: Tally,
    evaluation: Collection[bytes] = frozenset(),
    begin: str = "",
) -> Iterator[Document]:
    """The same before doubled documents are dropped, from the source's files, or from the document named `begin` on.

    Whole repositories always come from the first: their files lie in another order than they do.
    """
    pieces = _usable(_readable(source, index, found, on_error=on_error, tally=tally, begin=begin), evaluation, tally)
    yield from pieces if source.per == "file" else whole(pieces)


def hashes(document: Document) -> Iterator[bytes]:
    """The content hashes by which a document, or a file of it, is known where it must not be trained on."""
    yield document.digest
    yield from (content_hash(part.text) for part in document.parts)


def _usable(pieces: Iterable[Document], evaluation: Collection[bytes], tally: Tally) -> Iterator[Document]:
    for piece in pieces:
        if not piece.text or piece.text.isspace():
            tally.dropped["empty"] += 1
        elif evaluation and piece.digest in evaluation:
            tally.dropped["in_eval"] += 1
        else:
            yield piece


def _readable(
    source: Source, index: int, found: list[SourceFile], *, on_error: OnError, tally: Tally, begin: str
) -> Iterator[Document]:
    """Every file and record that can be read, in order; what cannot stops here or is counted."""
    if source.per == "repository":
        found = sorted(found, key=lambda file: (file.repository, file.path))
        pieces = (_in_a_repository(piece, source.path) for piece in _read_all(found, source.format, index))
        yield from (ordered if _has_records(found) else iter)(_sound(pieces, on_error, tally))
        return
    place, record = _place(found, begin)
    yield from _sound(_read_all(found[place:], source.format, index, record), on_error, tally)


def _place(found: list[SourceFile], name: str) -> tuple[int, int]:
    """Which file, of files sorted by name, holds the document of this name, and as which record; else the very first.

    A document of a file of records is named after the file, a colon and its number.
    """
    file, _, record = name.rpartition(":")
    for candidate, number in ((name, "1"), (file, record)):
        place = bisect_left(found, candidate, key=lambda each: each.name)
        if number.isdecimal() and place < len(found) and found[place].name == candidate:
            return place, int(number)
    return 0, 1


def _has_records(found: Iterable[SourceFile]) -> bool:
    return any(kind_of(file.relative, "code") is not Kind.WHOLE for file in found)


def _sound(pieces: Iterable[Document | Unreadable], on_error: str, tally: Tally) -> Iterator[Document]:
    for piece in pieces:
        if not isinstance(piece, Unreadable):
            tally.read += 1
            yield piece
            continue
        if piece.ends_file:
            raise DataError(
                f"{piece}. What comes after it in this file is lost, and how much that is is not known: repair or "
                "remove the file; data.on_error: skip is for single documents."
            ) from piece
        if on_error == "stop":
            raise DataError(f"{piece}. Repair or remove it, or set data.on_error: skip.") from piece
        tally.read += piece.count
        tally.skipped[piece.reason] += piece.count
        tally.first_skipped = tally.first_skipped or str(piece)


def _in_a_repository(piece: Document | Unreadable, path: str) -> Document | Unreadable:
    if isinstance(piece, Unreadable) or piece.repository:
        return piece
    why = "belongs to no repository that is known, so per: repository has nowhere to put it"
    return Unreadable(f"{path}: {piece.name}", why, "no_repository")


def _read_all(
    found: Iterable[SourceFile], form: Format, index: int, first_record: int = 1
) -> Iterator[Document | Unreadable]:
    for number, file in enumerate(found):
        try:
            yield from _read(file, form, index, 1 if number else first_record)
        except Unreadable as error:
            error.ends_file = kind_of(file.relative, form) is not Kind.WHOLE and error.reason in _ENDINGS
            yield error


def _read(file: SourceFile, form: Format, index: int, first: int) -> Iterator[Document | Unreadable]:
    kind = kind_of(file.relative, form)
    if kind is Kind.WHOLE:
        yield _whole_file(file, form, index)
        return
    for record in records(file, kind, columns_for(form, file.address), first):
        if isinstance(record, Unreadable):
            yield record
            continue
        try:
            yield document_of(record, form, index, f"{file.name}:{record.number}")
        except Unreadable as error:
            yield error


def _whole_file(file: SourceFile, form: Format, index: int) -> Document:
    if form == "chat":
        raise Unreadable(file.address, "holds no records (.jsonl, .json, .parquet, .arrow, .feather)", "no_records")
    with decompressed(file) as stream:
        text = decoded(stream.read(), file.address)
    if form == "text":
        return Document(index, file.name, text)
    return Document(index, file.name, text, file.repository, file.path)


def whole(pieces: Iterable[Document]) -> Iterator[Document]:
    """One document for each run of pieces of one repository, which stand in the order of their paths already."""
    for repository, group in groupby(pieces, key=lambda piece: piece.repository):
        files = list(group)
        yield Document(
            files[0].source,
            repository,
            "".join(file.text for file in files),
            repository,
            "",
            next((file.stars for file in files if file.stars is not None), None),
            tuple(Part(file.path, file.text) for file in files),
        )


def ordered(pieces: Iterable[Document]) -> Iterator[Document]:
    """Pieces by repository, path and the order they came in.

    Records of a repository may stand far apart, so they are sorted on disk, in the directory for temporary files: it
    needs room for the whole source, the memory none.
    """
    with tempfile.TemporaryDirectory(prefix="ltt-") as folder, closing(_table(Path(folder))) as table:
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


def _table(folder: Path) -> sqlite3.Connection:
    table = sqlite3.connect(folder / "pieces.db", isolation_level=None)
    for setting in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
        table.execute(f"PRAGMA {setting}")
    table.execute("CREATE TABLE piece (source, name TEXT, text BLOB, repository TEXT, path TEXT, stars INTEGER)")
    table.execute("BEGIN")
    return table
