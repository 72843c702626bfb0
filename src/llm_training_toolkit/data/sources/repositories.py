"""Puts the files of a repository together into one document."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from llm_training_toolkit.data.sources.document import Document, Part
from llm_training_toolkit.errors import DataError


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
