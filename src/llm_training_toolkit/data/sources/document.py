"""What a source gives: documents, a count of what became of them, and why one could not be had."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from llm_training_toolkit.errors import DataError


@dataclass
class DocumentStats:
    """What became of the documents of one source: kept, dropped on purpose, skipped because unreadable (by reason).

    `read` counts what was looked at: files and records, also where a document is a whole repository of them.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str = ""


class UnreadableDocument(Exception):  # noqa: N818 - a finding that becomes a DataError only where the run is to stop
    """A document that cannot be had: where, why in words, the reason it is counted under, and how many are lost."""

    def __init__(self, where: str, why: str, reason: str, count: int = 1) -> None:
        super().__init__(f"{where}: {why}")
        self.reason = reason
        self.count = count
        self.ends_file = False
        """Nothing after it in a file of records can be read, and nobody knows how much that is."""


def check_skipped(tallies: Iterable[DocumentStats], max_skipped: float) -> None:
    """Raise DataError when a larger share of what was read than `max_skipped` could not be read."""
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
