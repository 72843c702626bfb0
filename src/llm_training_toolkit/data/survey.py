"""Finds out which documents there are and which are held out, before anything is rendered."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.config.schema import Data
from llm_training_toolkit.data.sources import Document, Tally, check_skipped, content_hash, documents
from llm_training_toolkit.data.store import read_values, write_columns
from llm_training_toolkit.errors import DataError

_EVERY = 256


@dataclass(frozen=True)
class Survey:
    """The documents in reading order: source number, content hash, held out or not; and what each source dropped."""

    sources: list[int]
    hashes: list[bytes]
    held: list[bool]
    dropped: list[dict[str, int]]

    @classmethod
    def read(cls, directory: Path) -> Survey:
        """Open a written survey."""
        file = directory / "documents.arrow"
        dropped = json.loads((directory / "dropped.json").read_text(encoding="utf-8"))
        return cls(read_values(file, "source"), read_values(file, "hash"), read_values(file, "held"), dropped)

    def count(self, *, held: bool, source: int | None = None) -> int:
        """Number of documents that are held out, or that are not, of one source or all."""
        return sum(is_held is held for of, is_held in zip(self.sources, self.held, strict=True) if source in {of, None})


def take(data: Data, directory: Path, progress: Callable[[int], None]) -> None:
    """Read every document once and write the survey into an existing directory.

    Documents whose content appears in two sources count for the first. Raises DataError for what `documents` raises
    and when data.max_skipped is exceeded or no document is left to train on.
    """
    tallies = [Tally() for _ in data.sources]
    seen: set[bytes] = set()
    sources, names, hashes = [], [], []
    for index, (source, tally) in enumerate(zip(data.sources, tallies, strict=True)):
        for document in documents(source, index, on_error=data.on_error, tally=tally, seen=seen):
            sources.append(index)
            names.append(document.name)
            hashes.append(content_hash(document.text))
            if len(names) % _EVERY == 0:
                progress(len(names))
    progress(len(names))
    check_skipped(tallies, data.max_skipped)
    if not names:
        raise DataError(
            f"data.sources: no document is left ({', '.join(source.path for source in data.sources)} hold only empty "
            "or unreadable ones). Give files with text in them."
        )
    held = hold_out(hashes, data.eval.fraction)
    columns = {"source": sources, "name": names, "hash": hashes, "held": held}
    write_columns(directory / "documents.arrow", columns)
    dropped = json.dumps([dict(tally.dropped + tally.skipped) for tally in tallies])
    (directory / "dropped.json").write_text(dropped, encoding="utf-8")


def hold_out(hashes: list[bytes], fraction: float) -> list[bool]:
    """Which documents are held out: those whose hash, read as a number in [0, 1), lies below the fraction.

    So a document keeps its side when others come or go. A fraction above 0 takes at least one of two documents or
    more, and at least one stays.
    """
    if fraction == 0.0 or len(hashes) < 2:
        return [False] * len(hashes)
    places = [int.from_bytes(digest[:8], "big") * 2.0**-64 for digest in hashes]
    first, last = places.index(min(places)), places.index(max(places))
    return [(place < fraction or i == first) and i != last for i, place in enumerate(places)]


def reread(data: Data, survey: Survey, *, held: bool) -> Iterator[tuple[int, Document]]:
    """Yield the held-out documents, or the others, with their number within their source.

    Raises DataError when a document is not the one the survey saw.
    """
    seen: set[bytes] = set()
    position = number = 0
    for index, source in enumerate(data.sources):
        for number, document in enumerate(documents(source, index, on_error=data.on_error, seen=seen)):
            if position >= len(survey.hashes) or content_hash(document.text) != survey.hashes[position]:
                raise _changed(document.name, source.path)
            if survey.held[position] is held:
                yield number, document
            position += 1
    if position != len(survey.hashes):
        raise _changed(f"document {number}", data.sources[-1].path)


def _changed(name: str, path: str) -> DataError:
    return DataError(
        f"{path}: {name} changed while the data was being prepared. Let nothing write into the sources, and prepare "
        "again."
    )
