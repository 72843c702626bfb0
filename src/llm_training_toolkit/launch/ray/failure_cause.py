"""Diagnosis of a failed worker group: picks the cause among the symptoms. Pure.

If one rank dies, the others raise errors about closed connections, often before Ray knows of the death. Hence the
order: a hang that the driver ended, an error with a remedy, a lost node, a process that died silently, the first error
that a rank reported, Ray's error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llm_training_toolkit.distributed.events import WorkerErrorEvent, WorkerStartedEvent
from llm_training_toolkit.launch.ray.failure_policy import AttemptFailure, FailureKind


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


def diagnose_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    """Return the cause of a group's failure at `step`."""
    if seen.hang:
        rank, node = (seen.hung_worker.rank, seen.hung_worker.address) if seen.hung_worker else (None, None)
        return AttemptFailure("hang", seen.hang, step, rank, node)
    errors = sorted(seen.errors, key=lambda error: not error.helped)  # errors with a remedy first
    if errors and errors[0].helped:
        return _build_reported_failure(errors[0], seen, step)
    lost = {rank for rank, (kind, _) in seen.deaths.items() if kind == "node_lost"}
    gone = [worker for rank, worker in seen.workers.items() if worker.node in seen.lost_nodes or rank in lost]
    if gone:
        return _build_node_failure(gone, seen, step)
    if seen.deaths:
        return _build_death_failure(seen, step)
    return _build_reported_failure(errors[0], seen, step) if errors else _build_ray_failure(seen, step)


def _build_node_failure(gone: Sequence[WorkerStartedEvent], seen: FailureEvidence, step: int) -> AttemptFailure:
    first = gone[0]
    ranks = sorted({worker.rank for worker in gone if worker.address == first.address})
    named = f"node {first.address} with {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    announced = first.node in seen.draining_nodes
    kind: FailureKind = "preempted" if announced else "node_lost"
    return AttemptFailure(
        kind, f"{named} {'was taken away' if announced else 'is lost'}", step, first.rank, first.address
    )


def _build_death_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    # Memory first: the system kills one process for it, and others on its node may die as a consequence.
    rank, (kind, text) = min(seen.deaths.items(), key=lambda death: (death[1][0] != "oom", death[0]))
    worker = seen.workers[rank]
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


def _build_reported_failure(error: WorkerErrorEvent, seen: FailureEvidence, step: int) -> AttemptFailure:
    worker = seen.workers.get(error.rank)
    cause = str(error.text) if error.helped else f"rank {error.rank} failed: {error.text}"
    node = worker.address if worker else None
    return AttemptFailure("raised", cause, step, error.rank, node, helped=bool(error.helped))


def _build_ray_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    """Build the failure of the driver's helpers, or of workers that never started."""
    if seen.out_of_memory_error:
        return AttemptFailure(
            "oom",
            f"the memory of the driver's node ran out: {_find_memory_sentence(seen.out_of_memory_error)}",
            step,
        )
    kind: FailureKind = "killed" if seen.workers else "not_started"
    return AttemptFailure(
        kind, f"the workers {'ended' if seen.workers else 'did not start'}: {_get_last_line(seen.ray_error)}", step
    )


def _get_last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray gives no reason"


def _find_memory_sentence(text: str) -> str:
    """Return the sentence with the numbers from Ray's long advice."""
    sentences = [part.strip() for line in text.splitlines() for part in line.split(". ")]
    return next((part for part in sentences if "GB" in part), _get_last_line(text))[:300]
