"""Failures of worker groups, and the decision to start another group, from the run's attempts. Pure.

A failure is stored in its attempt's file, so that the count continues over several starts of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Literal, Self

from llm_training_toolkit.config.schema import FailuresConfig

FailureKind = Literal["raised", "killed", "oom", "hang", "node_lost", "preempted", "not_started"]
_STEP_UNRELATED_KINDS: tuple[FailureKind, ...] = ("node_lost", "not_started")
_EXCLUDE_AFTER_FAILURES = 2  # of a node within one start of a run


@dataclass(frozen=True)
class AttemptFailure:
    """Failure that ended a worker group before the run."""

    kind: FailureKind
    cause: str
    """Description, with rank and node."""
    step: int
    """Step that was not completed, counted from 1."""
    rank: int | None = None
    node: str | None = None
    """Address of the node where it began, None if unknown."""
    helped: bool = False
    """True if the next attempt has a remedy, so that this failure is not counted."""
    starting: bool = False
    """True if no rank had reached a step."""

    @property
    def is_step_related(self) -> bool:
        """True if the step may be the cause: false for machine failures and before the first step."""
        return not self.starting and self.kind not in _STEP_UNRELATED_KINDS

    def to_json(self) -> dict[str, Any]:
        """Return the form stored in the attempt."""
        return asdict(self)

    @classmethod
    def from_attempt(cls, attempt: Mapping[str, Any]) -> Self | None:
        """Return the failure in an attempt's record, None if it succeeded or died unrecorded."""
        kept = attempt.get("failure")
        return cls(**kept) if kept else None

    @property
    def is_counted(self) -> bool:
        """True if `failures.max_failures` counts it: false for announced preemptions and failures with a remedy."""
        return not self.helped and self.kind != "preempted"


def find_counted_failures(attempts: Mapping[int, Mapping[str, Any]]) -> dict[int, AttemptFailure]:
    """Return the counted failures by attempt number, from attempt records by number."""
    found = {number: AttemptFailure.from_attempt(record) for number, record in sorted(attempts.items())}
    return {number: failure for number, failure in found.items() if failure and failure.is_counted}


def find_abort_reason(
    failures: Mapping[int, AttemptFailure], saved_by: int, policy: FailuresConfig, avoided: Collection[str] = ()
) -> str:
    """Return why the run must end after its newest failure, "" if new workers may start.

    A step that failed on a single node of `avoided`, which the next workers avoid, is retried elsewhere.
    `saved_by` is the attempt that wrote the newest complete checkpoint (0: none); earlier failures no longer count.
    A run's only counted failure never ends it with `max_failures` above 0 and `max_same_step_failures` above 1.
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
    """Count the failures since the newest complete checkpoint, including the attempt that wrote it."""
    return sum(number >= saved_by for number in failures)


def _find_same_step_failures(failures: Sequence[AttemptFailure]) -> list[AttemptFailure]:
    """Return the newest consecutive failures at the newest one's step, newest first."""
    newest = failures[-1]
    if not newest.is_step_related:
        return []
    counted = [failure for failure in reversed(failures) if failure.is_step_related]
    return list(takewhile(lambda failure: failure.step == newest.step, counted))


def find_excluded_nodes(failures: Mapping[int, AttemptFailure], since: int) -> dict[str, str]:
    """Return the nodes that failed twice in attempts after number `since`: newest cause by address."""
    recent = [failure for number, failure in failures.items() if number > since and failure.node is not None]
    counted = Counter(failure.node for failure in recent)
    return {str(each.node): each.cause for each in recent if counted[each.node] >= _EXCLUDE_AFTER_FAILURES}
