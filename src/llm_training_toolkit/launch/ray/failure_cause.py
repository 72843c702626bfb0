"""Which of the things that are seen when a group of workers ends is the cause. Pure.

When one rank dies, the others raise errors about connections it has closed, often before Ray knows of the death.
So the cause is looked for in this order: a hang that the driver ended itself, a node that is gone, a process that
died without a word, the first error that a rank told, what Ray says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_training_toolkit.distributed.context import Event
from llm_training_toolkit.launch.ray.failure_policy import AttemptFailure, FailureKind


@dataclass(frozen=True)
class WorkerInfo:
    """A rank's process, as it introduced itself."""

    rank: int
    node: str
    """Id of its node."""
    address: str
    pid: int
    started: float
    """When the process was started, in seconds since 1970: a process id may be given again."""
    actor: str
    """Id of its actor."""
    places: str
    """Id of the placement group that holds the places of all ranks."""


@dataclass(frozen=True)
class FailureEvidence:
    """What is known when a group has ended with an error."""

    workers: Mapping[int, WorkerInfo]
    """The ranks that have started."""
    errors: Sequence[Event] = ()
    """What ranks told, in order."""
    deaths: Mapping[int, tuple[FailureKind, str]] = field(default_factory=dict)
    """Ranks whose process died on its own, how, and Ray's text."""
    lost_nodes: frozenset[str] = frozenset()
    """Ids of nodes that are gone."""
    draining_nodes: frozenset[str] = frozenset()
    """Ids of nodes whose end was announced."""
    hang: str = ""
    """The hang that the driver ended, in words."""
    hung_worker: WorkerInfo | None = None
    """The rank that held up the others, where it is one."""
    out_of_memory_error: str = ""
    """Ray's text, where a process of the driver's own node was ended for its memory."""
    ray_error: str = ""
    """What Ray says."""
    has_stepped: bool = True
    """Some rank had come to a step."""


def diagnose_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    """The cause of a group's end at `step`."""
    if seen.hang:
        rank, node = (seen.hung_worker.rank, seen.hung_worker.address) if seen.hung_worker else (None, None)
        return AttemptFailure("hang", seen.hang, step, rank, node)
    errors = sorted(seen.errors, key=lambda error: not error["helped"])  # a remedy that is known comes first
    if errors and errors[0]["helped"]:
        return _build_reported_failure(errors[0], seen, step)
    lost = {rank for rank, (kind, _) in seen.deaths.items() if kind == "node lost"}
    gone = [worker for rank, worker in seen.workers.items() if worker.node in seen.lost_nodes or rank in lost]
    if gone:
        return _build_node_failure(gone, seen, step)
    if seen.deaths:
        return _build_death_failure(seen, step)
    return _build_reported_failure(errors[0], seen, step) if errors else _build_ray_failure(seen, step)


def _build_node_failure(gone: Sequence[WorkerInfo], seen: FailureEvidence, step: int) -> AttemptFailure:
    first = gone[0]
    ranks = sorted({worker.rank for worker in gone if worker.address == first.address})
    named = f"node {first.address} with {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
    announced = first.node in seen.draining_nodes
    kind: FailureKind = "taken away" if announced else "node lost"
    return AttemptFailure(
        kind, f"{named} {'was taken away' if announced else 'is lost'}", step, first.rank, first.address
    )


def _build_death_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    # Memory first: the system ends one process for it, and the others of its node may follow by themselves.
    rank, (kind, text) = min(seen.deaths.items(), key=lambda death: (death[1][0] != "out of memory", death[0]))
    worker = seen.workers[rank]
    if kind == "out of memory":
        cause = (
            f"rank {rank} was ended because the memory of node {worker.address} ran out: {_find_memory_sentence(text)}"
        )
        return AttemptFailure(kind, cause, step, rank, worker.address)
    cause = (
        f"rank {rank} failed: its process {worker.pid} on node {worker.address} ended without a word (killed from "
        "outside, by the system when the memory ran out, or crashed; its log may say more)"
    )
    return AttemptFailure(kind, cause, step, rank, worker.address)


def _build_reported_failure(error: Event, seen: FailureEvidence, step: int) -> AttemptFailure:
    worker = seen.workers.get(error["rank"])
    cause = str(error["text"]) if error["helped"] else f"rank {error['rank']} failed: {error['text']}"
    node = worker.address if worker else None
    return AttemptFailure("raised", cause, step, error["rank"], node, helped=bool(error["helped"]))


def _build_ray_failure(seen: FailureEvidence, step: int) -> AttemptFailure:
    """The driver's own helpers ended, or the workers never began."""
    if seen.out_of_memory_error:
        return AttemptFailure(
            "out of memory",
            f"the memory of the driver's node ran out: {_find_memory_sentence(seen.out_of_memory_error)}",
            step,
        )
    kind: FailureKind = "killed" if seen.workers else "not started"
    return AttemptFailure(
        kind, f"the workers {'ended' if seen.workers else 'did not start'}: {_get_last_line(seen.ray_error)}", step
    )


def _get_last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray gives no reason"


def _find_memory_sentence(text: str) -> str:
    """The sentence of Ray's long advice that has the numbers."""
    sentences = [part.strip() for line in text.splitlines() for part in line.split(". ")]
    return next((part for part in sentences if "GB" in part), _get_last_line(text))[:300]


def parse_worker_info(event: Mapping[str, Any]) -> WorkerInfo:
    """A worker from the event with which it introduced itself."""
    names = ("rank", "node", "address", "pid", "started", "actor", "places")
    return WorkerInfo(**{name: event[name] for name in names})
