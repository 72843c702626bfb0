"""Document counts of a source, and the error for an unreadable document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_training_toolkit.errors import DataError

_MAX_FILTER_VALUES = 1000  # distinct values remembered per column, to name some if a filter leaves nothing


@dataclass
class DocumentStats:
    """Document counts of one source: kept, dropped by a filter, skipped as unreadable (by reason).

    `read` counts files and records, also if a document is a whole repository of them.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str = ""
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


class UnreadableDocument(Exception):  # noqa: N818 - a finding that becomes a DataError only where the run is to stop
    """Error for an unreadable document: location, cause, `reason` to count it under, `count` of documents lost."""

    def __init__(self, where: str, why: str, reason: str, count: int = 1) -> None:
        super().__init__(f"{where}: {why}")
        self.reason = reason
        self.count = count
        self.ends_file = False  # True: the rest of a record file is lost, an unknown number of records


def check_skipped(tallies: Iterable[DocumentStats], max_skipped: float) -> None:
    """Raise DataError if the unreadable share of the documents read exceeds `max_skipped`."""
    tallies = list(tallies)
    reasons: Counter[str] = sum((tally.skipped for tally in tallies), Counter())
    skipped, total = reasons.total(), sum(tally.read for tally in tallies)
    if skipped and skipped > max_skipped * total:
        first = next(tally.first_skipped for tally in tallies if tally.first_skipped)
        listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        raise DataError(
            f"data.max_skipped: {skipped} of {total} documents could not be read ({listed}), more than the "
            f"share of {max_skipped:g} that may be skipped. The first: {first}. Repair them, or raise data.max_skipped."
        )
