"""Failures of worker groups: diagnosis from the evidence, and the decision to start another group. Pure.

A failure is stored in its attempt's file, so that the count continues over several starts of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any, Literal, Self

from llm_training_toolkit.config.schema import FailuresConfig
from llm_training_toolkit.distributed.events import WorkerErrorEvent, WorkerStartedEvent

FailureKind = Literal["raised", "killed", "oom", "hang", "node_lost", "preempted", "not_started"]
_STEP_UNRELATED_KINDS: tuple[FailureKind, ...] = ("node_lost", "not_started")
_RESTART_PAUSES = (0.0, 5.0, 15.0, 60.0)  # seconds, by the number of consecutive failures without a step
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


@dataclass(frozen=True)
class FailureEvidence:
    """Evidence collected after a group ended with an error."""

    workers: Mapping[int, WorkerStartedEvent]
    """Ranks that have started."""
    errors: Sequence[WorkerErrorEvent] = ()
    """Errors that ranks reported, in order."""
    deaths: Mapping[int, tuple[FailureKind, str]] = field(default_factory=dict)
    """Kind of death and Ray's text, by rank, for processes that died on their own."""
    lost_nodes: frozenset[str] = frozenset()
    """Ids of lost nodes."""
    draining_nodes: frozenset[str] = frozenset()
    """Ids of nodes whose preemption was announced."""
    hang: str = ""
    """Description of the hang that the driver ended, if there was one."""
    hung_worker: WorkerStartedEvent | None = None
    """Worker that blocked the others, if it is a single one."""
    out_of_memory_error: str = ""
    """Ray's text, if a process on the driver's node was killed for lack of memory."""
    ray_error: str = ""
    """Ray's error."""
    has_stepped: bool = True
    """True if some rank had reached a step."""


def diagnose_failure(evidence: FailureEvidence, step: int) -> AttemptFailure:
    """Return the cause of a group's failure at `step`, which is one of many symptoms.

    If one rank dies, the others raise errors about closed connections, often before Ray knows of the death. Hence the
    order: a hang that the driver ended, an error with a remedy, a lost node, a process that died silently, the first
    error that a rank reported, Ray's error.
    """
    if evidence.hang:
        rank, node = (evidence.hung_worker.rank, evidence.hung_worker.address) if evidence.hung_worker else (None, None)
        return AttemptFailure("hang", evidence.hang, step, rank, node)
    errors = sorted(evidence.errors, key=lambda error: not error.helped)  # errors with a remedy first
    if errors and errors[0].helped:
        return _build_reported_failure(errors[0], evidence, step)
    lost_ranks = {rank for rank, (kind, _) in evidence.deaths.items() if kind == "node_lost"}
    lost_workers = [
        worker for rank, worker in evidence.workers.items() if worker.node in evidence.lost_nodes or rank in lost_ranks
    ]
    if lost_workers:
        return _build_node_failure(lost_workers, evidence, step)
    if evidence.deaths:
        return _build_death_failure(evidence, step)
    return _build_reported_failure(errors[0], evidence, step) if errors else _build_ray_failure(evidence, step)


def _build_node_failure(
    lost_workers: Sequence[WorkerStartedEvent], evidence: FailureEvidence, step: int
) -> AttemptFailure:
    first = lost_workers[0]
    ranks = sorted({worker.rank for worker in lost_workers if worker.address == first.address})
    named = f"node {first.address} with {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    announced = first.node in evidence.draining_nodes
    kind: FailureKind = "preempted" if announced else "node_lost"
    return AttemptFailure(
        kind, f"{named} {'was preempted' if announced else 'is lost'}", step, first.rank, first.address
    )


def _build_death_failure(evidence: FailureEvidence, step: int) -> AttemptFailure:
    # Memory first: the system kills one process for it, and others on its node may die as a consequence.
    rank, (kind, text) = min(evidence.deaths.items(), key=lambda death: (death[1][0] != "oom", death[0]))
    worker = evidence.workers[rank]
    if kind == "oom":
        cause = (
            f"rank {rank} was ended because the memory of node {worker.address} ran out: {_find_memory_sentence(text)}"
        )
        return AttemptFailure(kind, cause, step, rank, worker.address)
    cause = (
        f"rank {rank} failed: its process {worker.pid} on node {worker.address} ended without a word (killed from "
        "outside, by the system when the memory ran out, or crashed; its log may say more)"
    )
    return AttemptFailure(kind, cause, step, rank, worker.address)


def _build_reported_failure(error: WorkerErrorEvent, evidence: FailureEvidence, step: int) -> AttemptFailure:
    worker = evidence.workers.get(error.rank)
    cause = str(error.text) if error.helped else f"rank {error.rank} failed: {error.text}"
    node = worker.address if worker else None
    return AttemptFailure("raised", cause, step, error.rank, node, helped=bool(error.helped))


def _build_ray_failure(evidence: FailureEvidence, step: int) -> AttemptFailure:
    """Build the failure of the driver's helpers, or of workers that never started."""
    if evidence.out_of_memory_error:
        return AttemptFailure(
            "oom",
            f"the memory of the driver's node ran out: {_find_memory_sentence(evidence.out_of_memory_error)}",
            step,
        )
    kind: FailureKind = "killed" if evidence.workers else "not_started"
    return AttemptFailure(
        kind,
        f"the workers {'ended' if evidence.workers else 'did not start'}: {_get_last_line(evidence.ray_error)}",
        step,
    )


def _get_last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray gives no reason"


def _find_memory_sentence(text: str) -> str:
    """Return the sentence with the numbers from Ray's long advice."""
    sentences = [part.strip() for line in text.splitlines() for part in line.split(". ")]
    return next((part for part in sentences if "GB" in part), _get_last_line(text))[:300]


def find_counted_failures(attempts: Mapping[int, Mapping[str, Any]]) -> dict[int, AttemptFailure]:
    """Return the counted failures by attempt number, from attempt records by number."""
    found = {number: AttemptFailure.from_attempt(record) for number, record in sorted(attempts.items())}
    return {number: failure for number, failure in found.items() if failure and failure.is_counted}


def find_abort_reason(
    failures: Mapping[int, AttemptFailure], saving_attempt: int, policy: FailuresConfig, avoidable: Collection[str] = ()
) -> str | None:
    """Return why the run must end after its newest failure; None if new workers may start.

    A step that failed on a single node of `avoidable`, which the next workers do without, is retried elsewhere.
    `saving_attempt` is the attempt that wrote the newest complete checkpoint (0 = no attempt); only later failures
    count. A run's only counted failure never ends it with `max_failures` above 0 and `max_same_step_failures` above 1.
    """
    newest = list(failures.values())[-1]
    repeats = _find_same_step_failures(list(failures.values()))
    repeated, where = len(repeats), {failure.node for failure in repeats}
    if repeated >= policy.max_same_step_failures and not (len(where) == 1 and where <= set(avoidable)):
        times = {1: "once", 2: "twice"}.get(repeated, f"{repeated} times")
        return (
            f"step {newest.step} failed {times} in a row, so new workers would most likely fail there again "
            f"(failures.max_same_step_failures = {policy.max_same_step_failures}). The last time {newest.cause}"
        )
    if failure_count(failures, saving_attempt) > policy.max_failures:
        return f"{newest.cause}. All restarts (failures.max_failures = {policy.max_failures}) are used up"
    return None


def failure_count(failures: Mapping[int, AttemptFailure], saving_attempt: int) -> int:
    """Count the failures since the newest complete checkpoint, including the attempt that wrote it."""
    return sum(number >= saving_attempt for number in failures)


def _find_same_step_failures(failures: Sequence[AttemptFailure]) -> list[AttemptFailure]:
    """Return the newest consecutive failures at the newest one's step, newest first."""
    newest = failures[-1]
    if not newest.is_step_related:
        return []
    counted = [failure for failure in reversed(failures) if failure.is_step_related]
    return list(takewhile(lambda failure: failure.step == newest.step, counted))


def find_restart_pause(failures: Mapping[int, AttemptFailure]) -> float:
    """Return the seconds to wait before the next group: 5, 15, then 60 after consecutive failures without a step.

    Storage or a network that is away for a minute must not use up the retries. A group that had stepped is replaced at
    once.
    """
    without_step = len(list(takewhile(lambda failure: failure.starting, reversed(list(failures.values())))))
    return _RESTART_PAUSES[min(without_step, len(_RESTART_PAUSES) - 1)]


def find_excluded_nodes(failures: Mapping[int, AttemptFailure], since: int) -> dict[str, str]:
    """Return the nodes that failed twice in attempts after number `since`: newest cause by address."""
    recent = [failure for number, failure in failures.items() if number > since and failure.node is not None]
    counted = Counter(failure.node for failure in recent)
    return {str(each.node): each.cause for each in recent if counted[each.node] >= _EXCLUDE_AFTER_FAILURES}
