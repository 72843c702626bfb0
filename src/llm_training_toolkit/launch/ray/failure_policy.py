"""What went wrong with a group of workers, and whether others may follow: from the attempts of the run. Pure.

A failure is kept in the file of its attempt, so that the count goes on over several starts of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal, Self

from llm_training_toolkit.config.schema import FailuresConfig

FailureKind = Literal["raised", "killed", "out of memory", "hang", "node lost", "taken away", "not started"]
_STEP_UNRELATED_KINDS: tuple[FailureKind, ...] = ("node lost", "not started")
_EXCLUDE_AFTER_FAILURES = 2
"""Failures of a node within one start of a run after which it is left out."""


@dataclass(frozen=True)
class AttemptFailure:
    """Why a group of workers ended before the run did."""

    kind: FailureKind
    cause: str
    """In words, with rank and node."""
    step: int
    """The step that was not completed, counted from 1."""
    rank: int | None = None
    node: str | None = None
    """The address of the node it began on; None where that is not known."""
    helped: bool = False
    """The next attempt does differently, so that this one counts for nothing."""
    starting: bool = False
    """No rank had come to a step yet."""

    @property
    def is_step_related(self) -> bool:
        """Whether it may say something of the step: not what the machines did, nor what came before any step."""
        return not self.starting and self.kind not in _STEP_UNRELATED_KINDS

    def to_json(self) -> dict[str, Any]:
        """As kept in the attempt."""
        return asdict(self)

    @classmethod
    def from_attempt(cls, attempt: Mapping[str, Any]) -> Self | None:
        """The failure in an attempt's record; None where it did not fail, or nobody was left to write it down."""
        kept = attempt.get("failure")
        return cls(**kept) if kept else None

    @property
    def is_counted(self) -> bool:
        """Whether `failures.max_failures` counts it: neither a node preempted with notice nor what is remedied."""
        return not self.helped and self.kind != "taken away"


def find_counted_failures(attempts: Mapping[int, Mapping[str, Any]]) -> dict[int, AttemptFailure]:
    """The failures that count, by the number of the attempt, from attempts by number."""
    found = {number: AttemptFailure.from_attempt(record) for number, record in sorted(attempts.items())}
    return {number: failure for number, failure in found.items() if failure and failure.is_counted}


def find_abort_reason(
    failures: Mapping[int, AttemptFailure], saved_by: int, policy: FailuresConfig, avoided: Collection[str] = ()
) -> str:
    """Why the run must end after its newest failure; empty where new workers may start.

    A step that failed on a node of `avoided` alone, which the next workers keep off, is tried again elsewhere.
    `saved_by` is the attempt that wrote the newest complete checkpoint, 0 = there is none: what failed before that
    attempt is made up for. The newest failure alone never ends a run of a new start with `max` above 0.
    """
    newest = list(failures.values())[-1]
    repeats = _find_same_step_failures(list(failures.values()))
    repeated, where = len(repeats), {failure.node for failure in repeats}
    if repeated >= policy.max_same_step_failures and not (len(where) == 1 and where <= set(avoided)):
        times = {1: "once", 2: "twice"}.get(repeated, f"{repeated} times")
        return (
            f"step {newest.step} failed {times} in a row, so new workers would most likely fail there again "
            f"(failures.max_same_step_failures = {policy.max_same_step_failures}). The last time {newest.cause}"
        )
    if failure_count(failures, saved_by) > policy.max_failures:
        return f"{newest.cause}. All restarts (failures.max_failures = {policy.max_failures}) are used up"
    return ""


def failure_count(failures: Mapping[int, AttemptFailure], saved_by: int) -> int:
    """Failures since the newest complete checkpoint, with that of the attempt that wrote it."""
    return sum(number >= saved_by for number in failures)


def _find_same_step_failures(failures: Sequence[AttemptFailure]) -> list[AttemptFailure]:
    """The newest failures in a row that were at the newest one's step, newest first."""
    newest = failures[-1]
    if not newest.is_step_related:
        return []
    counted = [failure for failure in reversed(failures) if failure.is_step_related]
    return list(takewhile(lambda failure: failure.step == newest.step, counted))


def find_excluded_nodes(failures: Mapping[int, AttemptFailure], since: int) -> dict[str, str]:
    """Addresses of nodes that failed twice in the attempts after number `since`, with the newest cause."""
    recent = [failure for number, failure in failures.items() if number > since and failure.node is not None]
    counted = Counter(failure.node for failure in recent)
    return {str(each.node): each.cause for each in recent if counted[each.node] >= _EXCLUDE_AFTER_FAILURES}
