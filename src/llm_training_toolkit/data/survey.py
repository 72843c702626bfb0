"""Finds out which documents there are and which are held out, before anything is rendered."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm_training_toolkit.config.schema import Data, Source
from llm_training_toolkit.data.sources import Document, Tally, check_skipped, content_hash, documents, hashes
from llm_training_toolkit.data.store import read_array, write_columns, write_rows
from llm_training_toolkit.errors import DataError

_EVERY = 256
_SCHEMA = pa.schema([("source", pa.int32()), ("name", pa.large_string()), ("hash", pa.binary(16))])


@dataclass(frozen=True)
class Survey:
    """The documents in reading order, and what each source dropped, by reason.

    sources (documents,) int32: whose document it is; hashes (documents, 16) uint8: of its content; held (documents,)
    bool: whether it is held out. Sources are numbered as in `all_sources`.
    """

    sources: NDArray[np.int32]
    hashes: NDArray[np.uint8]
    held: NDArray[np.bool_]
    dropped: list[dict[str, int]]

    @classmethod
    def read(cls, directory: Path) -> Survey:
        """Open a written survey."""
        file = directory / "documents.arrow"
        dropped = json.loads((directory / "dropped.json").read_text(encoding="utf-8"))
        held = read_array(directory / "held.arrow", "held").astype(np.bool_)
        return cls(read_array(file, "source"), read_array(file, "hash"), held, dropped)

    def count(self, *, held: bool, source: int | None = None) -> int:
        """Number of documents that are held out, or that are not, of one source or all."""
        counted = self.held if held else ~self.held
        return int(np.count_nonzero(counted if source is None else counted & (self.sources == source)))


def all_sources(data: Data) -> tuple[Source, ...]:
    """The sources that are trained on, and behind them those of `data.eval.sources`: a source's number is its place."""
    return (*data.sources, *data.eval.sources)


def take(data: Data, directory: Path, progress: Callable[[int], None]) -> None:
    """Read every document once and write the survey into an existing directory.

    Documents whose content appears in two sources count for the first, and those of the evaluation for it alone. Takes
    about 130 bytes of memory a document. Raises DataError for what `documents` raises and when data.max_skipped is
    exceeded or no document is left to train on or to evaluate with.
    """
    tallies = [Tally() for _ in all_sources(data)]
    places = array("Q")

    def rows() -> Iterator[tuple[int, str, bytes]]:
        for _, document in _read(data, tallies):
            places.append(_place(document, data.eval.by))
            if len(places) % _EVERY == 0:
                progress(len(places))
            yield document.source, document.name, document.digest

    write_rows(directory / "documents.arrow", _SCHEMA, rows())
    progress(len(places))
    check_skipped(tallies, data.max_skipped)
    given = sum(tally.kept for tally in tallies[len(data.sources) :])
    _check_left(data.sources, len(places) - given, "sources")
    _check_left(data.eval.sources, given, "eval.sources")
    chosen = hold_out(np.array(places[given:], dtype=np.uint64), data.eval.fraction)
    if data.eval.by == "repository" and data.eval.fraction > 0.0 and not chosen.any():
        raise DataError(
            "data.eval.by: repository holds out nothing, because all documents are of one repository. Set it to "
            "document, or data.eval.fraction to 0."
        )
    write_columns(directory / "held.arrow", {"held": np.concatenate([np.ones(given, dtype=np.bool_), chosen])})
    dropped = json.dumps([dict(tally.dropped + tally.skipped) for tally in tallies])
    (directory / "dropped.json").write_text(dropped, encoding="utf-8")


def hold_out(places: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Which documents are held out: those whose place, read as a number in [0, 1), lies below the fraction.

    Places (documents,) are hashes, so a document keeps its side when others come or go; equal places stay together. A
    fraction above 0 takes at least one of two places or more, and at least one stays.
    """
    if fraction == 0.0 or len(places) == 0 or places.min() == places.max():
        return np.zeros(len(places), dtype=np.bool_)
    below = places.astype(np.float64) * 2.0**-64 < fraction
    held: NDArray[np.bool_] = (below | (places == places.min())) & (places != places.max())
    return held


def reread(data: Data, survey: Survey, *, held: bool) -> Iterator[tuple[int, Document]]:
    """Yield the held-out documents, or the others, with their number within their source.

    Raises DataError when a document is not the one the survey saw.
    """
    position, document = -1, None
    for position, (number, document) in enumerate(_read(data, [Tally() for _ in all_sources(data)])):
        if position >= len(survey.hashes) or document.digest != survey.hashes[position].tobytes():
            raise _changed(document.name, all_sources(data)[document.source].path)
        if survey.held[position] == held:
            yield number, document
    if position + 1 != len(survey.hashes):
        raise _changed(f"what comes after {document.name}" if document else "everything", data.sources[-1].path)


def _read(data: Data, tallies: list[Tally]) -> Iterator[tuple[int, Document]]:
    """Every document with its number within its source: those of the evaluation first, then those to train on."""
    seen: set[bytes] = set()
    evaluation: set[bytes] = set()
    sources = all_sources(data)
    for index in (*range(len(data.sources), len(sources)), *range(len(data.sources))):
        is_training = index < len(data.sources)
        found = documents(
            sources[index],
            index,
            on_error=data.on_error,
            tally=tallies[index],
            seen=seen,
            evaluation=evaluation if is_training else (),
        )
        for number, document in enumerate(found):
            if not is_training:
                evaluation.update(hashes(document))
            yield number, document


def _place(document: Document, by: Literal["document", "repository"]) -> int:
    """What decides on which side a document is: 64 bits of a hash, of its content or of its repository's name."""
    of_repository = by == "repository" and document.repository
    return int.from_bytes((content_hash(document.repository) if of_repository else document.digest)[:8], "big")


def _check_left(sources: tuple[Source, ...], documents_left: int, key: str) -> None:
    if sources and not documents_left:
        raise DataError(
            f"data.{key}: no document is left ({', '.join(source.path for source in sources)} hold only empty, doubled "
            "or unreadable ones). Give files with text in them."
        )


def _changed(name: str, path: str) -> DataError:
    return DataError(
        f"{path}: {name} changed while the data was being prepared. Let nothing write into the sources, and prepare "
        "again."
    )
