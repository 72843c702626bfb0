"""One group of workers, from its start to its end: Ray Train's `fit` in a thread, watched meanwhile.

The driver shows what the workers tell, asks them to leave when their number should change or a node is taken away,
and ends them when they hang. Ray starts no worker again: what follows is decided in `groups.py`.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from llm_training_toolkit import errors
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.distributed.context import Event, Wish
from llm_training_toolkit.errors import LaunchError, ToolkitError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray import worker_processes as rescue
from llm_training_toolkit.launch.ray.autoscaler import Autoscaler
from llm_training_toolkit.launch.ray.control_actor import OTHERS_BEAT_EVERY, Heard, open_line
from llm_training_toolkit.launch.ray.failure_cause import Seen, Worker, as_worker
from llm_training_toolkit.launch.ray.hang_detector import Hang, Watch, size_of, stands_in, waits_in
from llm_training_toolkit.launch.ray.resources import Node, Wanted, used_by_others
from llm_training_toolkit.launch.ray.scaling_policy import Growth
from llm_training_toolkit.launch.ray.train_fn import worker_main
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.attempts import last_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage import storage_of

_LISTEN_EVERY = 0.2
"""Seconds between two questions for what the workers have told."""
_LOOK_EVERY = 1.0
"""Seconds between two looks at the nodes and the heartbeats."""
_STARTS_WITHIN = 1200.0
"""Seconds that the first worker may take to start: Ray waits without end when a node dies in that moment."""
_END_EVERY = 30.0
"""Seconds after which workers that were to be ended, and still keep `fit` waiting, are ended again."""
_END_ROUNDS = 10
"""How often they are."""
_COLLECTIVE_TIMEOUTS = 4.0
"""Times `failures.hang` after which torch gives up an exchange by itself: later than the watch, which knows more."""


@dataclass(frozen=True)
class Job:
    """What all groups of a start work on."""

    run: RunDirectory
    config: Config
    wanted: Wanted
    autoscaler: Autoscaler
    rungs: tuple[int, ...] = ()
    """Steps after which a trial waits for `Groups.answer`."""


@dataclass(frozen=True)
class Assignment:
    """What one group is started with."""

    job: Job
    size: int
    avoid: tuple[Node, ...]
    """Nodes to keep off."""
    left_out: frozenset[str]
    """Addresses that failed too often."""
    began: float
    """When it was asked for, in seconds since 1970."""


@dataclass(frozen=True)
class Ended:
    """How a group ended: with what rank 0 returned, or with what is known of the failure."""

    result: dict[str, Any] | None
    seen: Seen


class FitStuckError(LaunchError):
    """Ray Train's `fit` waits in its thread for workers that never come, or never end."""


class Group:
    """A group of workers that trains."""

    def __init__(self, assignment: Assignment, console: Console) -> None:
        self._the, self._job, self._console = assignment, assignment.job, console
        self._line = open_line()
        self._line_lost: ray.exceptions.RayError | None = None
        self._workers: dict[int, Worker] = {}
        self._errors: list[Event] = []
        self._announced: set[str] = set()
        self._hang = ""
        self._hung: Worker | None = None
        self._watch = Watch(assignment.size, hang_seconds(self._job.config), OTHERS_BEAT_EVERY)
        self._growth = Growth(self._job.wanted, assignment.size, assignment.left_out)
        self._wish = Wish.GO_ON
        self._ended: list[Any] = []
        self._end_tried: list[float] = []

    def want(self, wish: Wish) -> None:
        """Tell the ranks what is wanted of the run. Any thread, any time."""
        self._line.want.remote(wish)

    def answer(self, step: int, wish: Wish) -> None:
        """Tell rank 0, which waits after this step, whether the trial goes on. Any thread, any time."""
        self._line.answer.remote(step, wish)

    def run(self) -> Ended:
        """Start the workers and follow them to their end. Raises the first ToolkitError that a rank met."""
        thread = threading.Thread(target=self._fit, daemon=True, name="ray-train")
        thread.start()
        began = looked = time.monotonic()
        while thread.is_alive():
            time.sleep(_LISTEN_EVERY)
            heard = self._listen()
            now = time.monotonic()
            if heard is not None and now - looked >= _LOOK_EVERY:
                looked = now
                self._look(heard, now)
            if self._end_tried and now - self._end_tried[-1] > _END_EVERY:
                self._end_workers()
            if not self._workers and now - began > _STARTS_WITHIN:
                raise FitStuckError(f"no worker has started within {_STARTS_WITHIN / 60:g} minutes: see `ray status`")
        self._listen()
        final = next((error for error in self._errors if error["final"]), None)
        if final is not None:
            raise _as_error(final)
        [ended] = self._ended
        return Ended(ended if isinstance(ended, dict) else None, self._seen(ended))

    def _fit(self) -> None:
        try:
            self._ended.append(_trainer(self._the, self._line).fit().return_value)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: `run` looks at it in the main one
            self._ended.append(error)

    def _listen(self) -> Heard | None:
        """Take and show what the workers have told; None when the line itself is lost, which ends them."""
        if self._line_lost is not None:
            return None
        try:
            taken: tuple[list[Event], Heard] = ray.get(self._line.take.remote())
        except ray.exceptions.RayError as error:  # its process may be the one that is ended when the memory runs out
            self._line_lost = error
            self._end_workers()
            return None
        for event in taken[0]:
            if event["kind"] == "introduction":
                self._workers[event["rank"]] = as_worker(event)
            elif event["kind"] == "error":
                self._errors.append(event)
            worker = self._workers.get(event.get("rank", -1))
            self._console.show({**event, "address": worker.address} if worker else event)
        return taken[1]

    def _look(self, heard: Heard, now: float) -> None:
        """Whether nodes come or go, and whether the ranks advance."""
        self._watch.see(heard, now)
        if self._hang:
            return
        hang = self._watch.hung(now)
        if hang is not None:
            self._end_hang(hang)
        elif len(self._workers) == self._the.size:
            with suppress(ray.exceptions.RayError):  # Ray's head is busy or starts anew: training goes on without it
                self._look_at_nodes(now)

    def _look_at_nodes(self, now: float) -> None:
        self._leave_nodes_taken_away()
        if self._growth.due(now):
            own = Counter(worker.node for worker in self._workers.values())
            living = nodes.living_nodes()
            self._job.autoscaler.ask(used_by_others(living, self._job.wanted, own))
            wish = self._growth.wish(nodes.answering(living), own, now)
            if wish > self._wish:
                self._wish = wish
                when = "now" if wish is Wish.LEAVE else "after the next checkpoint"
                self._console.say(f"there is room for more than {self._the.size} workers: making way {when}")
                self.want(wish)
            elif wish is Wish.GO_ON and self._wish is Wish.LEAVE_WHEN_SAVED:
                self._wish = wish
                self._console.say("that room is gone: staying")
                self._line.stay.remote()

    def _leave_nodes_taken_away(self) -> None:
        announced = nodes.taken_away({worker.node for worker in self._workers.values()})
        for node, deadline in announced.items():
            if node not in self._announced:
                self._announced.add(node)
                left = f" in {max(0.0, deadline / 1e3 - time.time()):.0f} s" if deadline else ""
                [address] = {worker.address for worker in self._workers.values() if worker.node == node}
                self._warn(f"node {address} will be taken away{left}: saving a checkpoint, then leaving it")
                self.want(Wish.LEAVE)

    def _end_hang(self, hang: Hang) -> None:
        """Say who holds up the others and where it stands, then end all of them; `fit` sees the rest."""
        logs = self._job.run.logs(last_attempt(self._job.run))
        paths = {rank: logs / f"rank_{rank}.log" for rank in self._workers}
        before = {rank: size_of(path) for rank, path in paths.items()}
        states = rescue.examine(self._workers.values())
        if len(hang.behind) == 1:
            self._hung = self._workers.get(next(iter(hang.behind)))
        told = [
            _in_words(self._workers[rank], doing, states.get(rank), stands_in(paths[rank], before[rank]))
            if rank in self._workers
            else f"rank {rank} has not started"
            for rank, doing in hang.behind.items()
        ]
        waiting = "; every rank waits for another" if len(told) == self._the.size > 1 else ""
        others = self._workers.keys() - hang.behind.keys()
        exchange = next(filter(None, (waits_in(paths[rank], before[rank]) for rank in sorted(others))), "")
        waiting += f"; the others wait in {exchange}" if exchange else ""
        self._hang = (
            f"no rank has advanced for {hang.seconds:.0f} s (failures.hang = {self._job.config.failures.hang}): "
            f"{'; '.join(told)}{waiting}. The stacks of all threads are in {logs}"
        )
        self._end_workers()

    def _end_workers(self) -> None:
        """End the processes of all ranks; from the second time on Ray is asked to end their actors as well.

        Raises FitStuckError where they outlive that.
        """
        if len(self._end_tried) == _END_ROUNDS:
            where = ", ".join(sorted({worker.address for worker in self._workers.values()}))
            cause = self._hang or str(self._line_lost)
            raise FitStuckError(f"{cause}. The workers cannot be ended: look after the processes on {where}")
        with suppress(ray.exceptions.RayError):  # a node or Ray's head that does not answer now is asked again
            rescue.end(self._workers.values())
            if self._end_tried:
                nodes.give_back({worker.places for worker in self._workers.values()})
        self._end_tried.append(time.monotonic())

    def _seen(self, ended: object) -> Seen:
        """What there is to find a cause in, once `fit` has ended."""
        if isinstance(ended, dict):
            return Seen(self._workers)
        nodes.give_back({worker.places for worker in self._workers.values()})
        living = {node.id for node in nodes.answering(nodes.living_nodes())}
        return Seen(
            workers=self._workers,
            errors=self._errors,
            deaths=nodes.deaths({rank: worker.actor for rank, worker in self._workers.items()}),
            lost=frozenset(worker.node for worker in self._workers.values()) - living,
            taken_away=frozenset(self._announced),
            hang=self._hang,
            hung=self._hung,
            memory=next((str(error) for error in (self._line_lost, ended) if isinstance(error, OutOfMemoryError)), ""),
            said=str(self._line_lost or ended),
            stepped=self._watch.stepped or any(error["doing"].startswith("step ") for error in self._errors),
        )

    def _warn(self, message: str) -> None:
        self._console.show({"kind": "warning", "message": message})


def hang_seconds(config: Config) -> float:
    """`failures.hang` in seconds."""
    seconds = duration_seconds(config.failures.hang)
    assert seconds is not None, "the schema takes durations alone"
    return seconds


def _in_words(worker: Worker, doing: str, state: str | None, stands: str) -> str:
    """What is known of a rank that does not advance."""
    named = f"rank {worker.rank} (process {worker.pid} on node {worker.address}) was last heard of at: {doing}"
    if state is None:
        return f"{named}; its node does not answer"
    stopped = "; its process had been stopped (SIGSTOP)" if state == "stopped" else ""
    return named + stopped + (f"; it stands in {stands}" if stands else f"; its process is {state}")


def _trainer(the: Assignment, line: Any) -> TorchTrainer:  # noqa: ANN401 - Ray's actor handles have no types
    job = the.job
    gpus = int(job.wanted.each.get("GPU", 0))
    timeout = max(900.0, _COLLECTIVE_TIMEOUTS * hang_seconds(job.config))
    return TorchTrainer(
        worker_main,
        train_loop_config={
            "run": storage_of(job.run.path).address(job.run.path),
            "line": line,
            "began": the.began,
            "group_began": time.time(),
            "rungs": job.rungs,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(timeout)),
        scaling_config=ScalingConfig(
            num_workers=the.size,
            use_gpu=bool(gpus),
            resources_per_worker=dict(job.wanted.each),
            placement_strategy=job.wanted.placement.upper(),
            label_selector=nodes.selector_without(the.avoid),
        ),
        run_config=RunConfig(
            # Ray keeps no checkpoints of ours: a name of its own for every group, so that it finds nothing to restore.
            name=f"start_{time.time_ns()}",
            storage_path=str(ray_directory(job.run)),
            # Ray's own count never refills and knows no exception.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": _worker_environment(job.config)},
        ),
    )


def ray_directory(run: RunDirectory) -> Path:
    """Where Ray Train keeps its own notes: in the run's logs, and of a run in a store where they are no one's."""
    is_here = storage_of(run.path).address(run.path) == str(run.path)
    return run.path / "logs" / "ray" if is_here else Path(tempfile.gettempdir()) / "llm-training-toolkit-ray"


def _worker_environment(config: Config) -> dict[str, str]:
    """Environment of every worker; what the configuration names wins."""
    tools = str(Path(sys.executable).parent)  # ninja, for the operations DeepSpeed compiles
    return {
        "OMP_NUM_THREADS": str(config.cluster.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        **config.cluster.env,
    }


def _as_error(event: Mapping[str, Any]) -> ToolkitError:
    """The worker's error again, of the class it had there."""
    kind = getattr(errors, str(event["type"]), ToolkitError)
    error: ToolkitError = kind(str(event["text"]))
    return error
