"""Documents of a source: counts, faults by kind, the error for an unreadable one, grouping by repository."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from llm_training_toolkit.data.types import Document, RepositoryFile
from llm_training_toolkit.errors import DataError

_MAX_FILTER_VALUES = 1000  # distinct values remembered per column, to name some if a filter leaves nothing
_MAX_KINDS = 40  # kinds of faults told apart per source; the others are counted by reason
_MAX_PLACES = 1000  # places in the report of each kind
_PLACES_SHOWN, _KINDS_SHOWN = 5, 12
_PLACE = re.compile(r"(?P<file>.*?)(?::|, row |, record )(?P<number>\d+)", re.DOTALL)


class UnreadableDocument(Exception):  # noqa: N818 - a finding that becomes a DataError only where the run is to stop
    """Error for an unreadable document: location, cause, `reason` to count it under, `count` of documents lost."""

    def __init__(self, where: str, why: str, reason: str, count: int = 1) -> None:
        super().__init__(f"{where}: {why}")
        self.where, self.why, self.reason = where, why, reason
        self.count = count
        self.ends_file = False  # True: the rest of a record file is lost, an unknown number of records


@dataclass
class Fault:
    """Faults of one kind: `why` of the first, the `reason` they are counted under, documents, and first places."""

    why: str
    reason: str
    count: int = 0
    places: list[str] = field(default_factory=list)


@dataclass
class DocumentStats:
    """Document counts of one source: kept, dropped by a filter, skipped as unreadable (by reason).

    `read` counts files and records, also if a document is a whole repository of them.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    cut: int = 0
    """Files and repositories cut into several documents because of their size."""
    faults: dict[str, Fault] = field(default_factory=dict)
    """Unreadable documents by kind: their cause without positions and numbers."""
    lost_files: list[str] = field(default_factory=list)
    """Record files that are damaged, so that the number of lost records is unknown."""
    filter_values: dict[str, Counter[str]] = field(default_factory=dict)
    """Values that the filter refused, by column; up to a thousand distinct ones."""
    filtered_columns: tuple[str, ...] = ()
    """Columns of the first record that the filter refused."""

    def add_filtered(self, record: Any, values: Mapping[str, Any]) -> None:  # noqa: ANN401 - whatever JSON can say
        """Count a record that the filter refused, with the values that it was refused for."""
        self.dropped["filtered"] += 1
        if not self.filtered_columns and isinstance(record, Mapping):
            self.filtered_columns = tuple(map(str, record))
        for column, value in values.items():
            seen = self.filter_values.setdefault(column, Counter())
            if len(seen) < _MAX_FILTER_VALUES:
                seen[str(value)[:40]] += 1

    def add_fault(self, error: UnreadableDocument) -> None:
        """Count an unreadable document under its kind."""
        self.read += error.count
        self.skipped[error.reason] += error.count
        kind = re.sub(r"(0x[0-9a-f]+|\d+)", "…", error.why)
        if kind not in self.faults and len(self.faults) >= _MAX_KINDS:
            kind = error.reason
        fault = self.faults.setdefault(kind, Fault(error.why, error.reason))
        fault.count += error.count
        if len(fault.places) < _MAX_PLACES:
            fault.places.append(error.where)
        if error.ends_file:
            self.lost_files.append(error.where)


def check_faults(
    tallies: Sequence[DocumentStats], *, skips: bool, max_skipped: float, report: Path | None = None
) -> None:
    """Raise DataError with every kind of fault if one may not be skipped, or their share exceeds `max_skipped`."""
    skipped, total = (sum(counts) for counts in zip(*((t.skipped.total(), t.read) for t in tallies), strict=True))
    lost = [file for tally in tallies for file in tally.lost_files]
    if not skipped or (skips and not lost and skipped <= max_skipped * total):
        return
    head = f"data.sources: {skipped:,} of {total:,} documents cannot be read"
    advice = "Repair or remove them, or set data.on_error: skip."
    if lost:
        advice = (
            f"What comes after it in {lost[0]} is lost, and how much that is is not known: repair or remove the file; "
            "data.on_error: skip is for single documents."
        )
    elif skips:
        head = f"data.max_skipped: {skipped:,} of {total:,} documents cannot be read, more than the share of "
        head += f"{max_skipped:g} that may be skipped"
        advice = "Repair or remove them, or raise data.max_skipped."
    where = "" if report is None else f"\nAll places: {report}"
    raise DataError("\n".join([f"{head}:", *(f"  {line}" for line in format_faults(tallies)), advice]) + where)


def format_faults(tallies: Iterable[DocumentStats]) -> list[str]:
    """Format the faults by kind, the commonest first: number, cause, and first places."""
    found = [(fault, tally) for tally in tallies for fault in tally.faults.values()]
    found.sort(key=lambda each: -each[0].count)
    lines = [_format_fault(fault, tally) for fault, tally in found[:_KINDS_SHOWN]]
    more = len(found) - len(lines)
    return [*lines, f"and {more} more kinds"] if more else lines


def _format_fault(fault: Fault, tally: DocumentStats) -> str:
    if fault.count == 1:
        return f"{fault.places[0]}: {fault.why}"
    shown = [match for match in map(_PLACE.fullmatch, fault.places[:_PLACES_SHOWN]) if match]
    more = ", …" if len(fault.places) > _PLACES_SHOWN else ""
    if len(shown) < min(fault.count, _PLACES_SHOWN):  # whole files, or a table that lacks a column
        listed = ", ".join(fault.places[:_PLACES_SHOWN])
        return f"{fault.count:,} of {tally.read:,} documents: {fault.why} ({listed}{more})"
    numbers = "; ".join(f"{file}: {', '.join(found)}" for file, found in _group_by_file(shown))
    return f"{fault.count:,} of {tally.read:,} records: {fault.why} ({numbers}{more})"


def _group_by_file(places: Sequence[re.Match[str]]) -> Iterator[tuple[str, list[str]]]:
    files = dict.fromkeys(match["file"] for match in places)
    for file in files:
        yield file, [f"{int(match['number']):,}" for match in places if match["file"] == file]


def write_fault_report(file: Path, paths: Sequence[str], tallies: Sequence[DocumentStats]) -> None:
    """Write the faults of every source as JSON, if there are any."""
    found = [
        {
            "path": path,
            "read": tally.read,
            "faults": [vars(fault) for fault in tally.faults.values()],
            "lost_files": tally.lost_files,
        }
        for path, tally in zip(paths, tallies, strict=True)
        if tally.faults
    ]
    if found:
        file.write_text(json.dumps({"sources": found}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def group_by_repository(pieces: Iterable[Document], max_characters: int, tally: DocumentStats) -> Iterator[Document]:
    """Merge consecutive pieces of a repository, already in path order, into documents: one, or several of a large one.

    A document has at most `max_characters` characters, or one file. The second one is called `repository:2`.
    """
    for repository, group in groupby(pieces, key=lambda piece: piece.repository):
        files: list[Document] = []
        number, size, stars = 1, 0, None
        for piece in group:
            stars = piece.stars if stars is None else stars
            if files and size + len(piece.text) > max_characters:
                tally.cut += number == 1
                yield _merge_files(files, repository, number, stars)
                number, files, size = number + 1, [], 0
            files.append(piece)
            size += len(piece.text)
        yield _merge_files(files, repository, number, stars)


def _merge_files(files: Sequence[Document], repository: str, number: int, stars: int | None) -> Document:
    return Document(
        files[0].source,
        repository if number == 1 else f"{repository}:{number}",
        "".join(file.text for file in files),
        repository,
        "",
        stars,
        tuple(RepositoryFile(file.path, file.text) for file in files),
    )
