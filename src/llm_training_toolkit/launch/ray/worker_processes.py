"""Stack dumps and kills of hung workers, by a task on their node, since they may not respond themselves.

`ray.kill` does not suffice: a stopped process (SIGSTOP) survives it and keeps its GPU memory.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm_training_toolkit.distributed.events import WorkerStartedEvent

STACK_SIGNAL = signal.SIGUSR1  # faulthandler then writes all stacks to the worker's log, whoever holds the GIL
_TASK_TIMEOUT_SECONDS = 30.0  # includes the start of the task


def request_worker_stacks(workers: Iterable[WorkerStartedEvent]) -> dict[int, str]:
    """Request each rank's stacks; return its process state, for ranks on responsive nodes only.

    Processes write their stacks to their logs later, once they are scheduled.
    """
    return _run_on_nodes(_request_stack_dumps, workers)


def kill_workers(workers: Iterable[WorkerStartedEvent]) -> None:
    """Kill the workers' processes at once, on any node."""
    _run_on_nodes(_kill_processes, workers)


def _run_on_nodes(
    task: Callable[[list[WorkerStartedEvent]], dict[int, str]], workers: Iterable[WorkerStartedEvent]
) -> dict[int, str]:
    by_node: dict[str, list[WorkerStartedEvent]] = {}
    for worker in workers:
        by_node.setdefault(worker.node, []).append(worker)
    refs = [_build_node_task(node, task).remote(there) for node, there in by_node.items()]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=_TASK_TIMEOUT_SECONDS) if refs else ([], [])
    for ref in late:
        ray.cancel(ref, force=True)
    found: dict[int, str] = {}
    for ref in ready:
        try:
            found |= ray.get(ref)
        except ray.exceptions.RayError:
            continue  # the node is lost, and its workers with it
    return found


def _build_node_task(node: str, task: Callable[[list[WorkerStartedEvent]], dict[int, str]]) -> Any:  # noqa: ANN401 - Ray has no types
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(task).options(num_cpus=0, max_retries=0, scheduling_strategy=there)


def _request_stack_dumps(workers: list[WorkerStartedEvent]) -> dict[int, str]:
    states = {}
    for worker, process in _find_processes(workers).items():
        with suppress(psutil.NoSuchProcess):
            states[worker.rank] = process.status()
            process.send_signal(STACK_SIGNAL)
            process.resume()  # a stopped process would write nothing; it is killed in a moment anyway
    return states


def _kill_processes(workers: list[WorkerStartedEvent]) -> dict[int, str]:
    for process in _find_processes(workers).values():
        with suppress(psutil.NoSuchProcess):  # already ended; the others on the node must still be killed
            process.kill()
    return {}


def _find_processes(workers: list[WorkerStartedEvent]) -> Mapping[WorkerStartedEvent, psutil.Process]:
    """Return the processes that still belong to these workers."""
    found = {}
    for worker in workers:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(worker.pid)
            if abs(process.create_time() - worker.started) < 1.0:
                found[worker] = process
    return found
