"""Worker group, from start to end: Ray Train's `fit` in a thread, watched by the driver.

The driver shows the workers' events, drains them when the group is resized or a node is preempted, and kills them when
they hang. Ray restarts no worker: `controller.py` decides on the next group.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import ray
from ray.exceptions import OutOfMemoryError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from llm_training_toolkit.config import Config
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import (
    Event,
    StragglerEvent,
    WarningEvent,
    WorkerErrorEvent,
    WorkerStartedEvent,
)
from llm_training_toolkit.distributed.flight_recorder import get_flight_record_path
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes, worker_processes
from llm_training_toolkit.launch.ray.capacity import AutoscalerClient
from llm_training_toolkit.launch.ray.cluster import get_ray_directory
from llm_training_toolkit.launch.ray.control_actor import (
    OTHER_RANKS_HEARTBEAT_SECONDS,
    HeartbeatsByRank,
    start_control_actor,
)
from llm_training_toolkit.launch.ray.failure_policy import FailureEvidence
from llm_training_toolkit.launch.ray.hang_detector import (
    HangDetector,
    HangReport,
    find_collective_call,
    find_current_call,
    format_hung_rank,
    get_hang_timeout,
    get_log_size,
)
from llm_training_toolkit.launch.ray.resources import ClusterNode, ResourceRequest, compute_usage_by_others
from llm_training_toolkit.launch.ray.scaling_policy import ElasticScalingPolicy
from llm_training_toolkit.launch.ray.train_fn import build_worker_environment, rebuild_error, worker_main
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.attempts import find_last_attempt
from llm_training_toolkit.runs.directory import RunDirectory

_EVENT_POLL_SECONDS = 0.2
_HEALTH_POLL_SECONDS = 1.0  # nodes and heartbeats
_START_TIMEOUT_SECONDS = 1200.0  # for the first worker: Ray waits forever if a node dies at that moment
_KILL_RETRY_SECONDS = 30.0  # if `fit` still waits for killed workers
_MAX_KILL_ATTEMPTS = 10
_FLIGHT_RECORD_SECONDS = OTHER_RANKS_HEARTBEAT_SECONDS + 3.0  # the next heartbeat of every rank, and its file
_STACK_SECONDS = 10.0  # until the stacks reach the logs; a resumed process on a busy machine once took over 1 s
# torch's collective timeout / `failures.hang_timeout`: the hang detector knows more, so it must fire first.
_COLLECTIVE_TIMEOUT_FACTOR = 4.0


@dataclass(frozen=True)
class RunSpec:
    """Specification shared by all worker groups of a start."""

    run: RunDirectory
    config: Config
    resource_request: ResourceRequest
    autoscaler: AutoscalerClient
    rungs: tuple[int, ...] = ()
    """Steps after which a trial waits for `TrainController.resolve_rung`."""


@dataclass(frozen=True)
class WorkerGroupSpec:
    """Specification of one worker group."""

    run_spec: RunSpec
    size: int
    unschedulable_nodes: tuple[ClusterNode, ...]
    """Nodes that get no worker: draining, unreachable or excluded."""
    excluded_nodes: frozenset[str]
    """Addresses that failed too often."""
    requested_at: float
    """Time of the request, in seconds since 1970."""


@dataclass(frozen=True)
class WorkerGroupResult:
    """Outcome of a group: rank 0's result, or the evidence of a failure."""

    result: dict[str, Any] | None
    evidence: FailureEvidence


class FitStuckError(LaunchError):
    """Error: Ray Train's `fit` blocks in its thread on workers that fail to start or to end."""


class WorkerGroup:
    """Group of training workers."""

    def __init__(self, spec: WorkerGroupSpec, console: Console) -> None:
        self._spec, self._run_spec, self._console = spec, spec.run_spec, console
        self._control = start_control_actor()
        self._control_error: ray.exceptions.RayError | None = None
        self._workers: dict[int, WorkerStartedEvent] = {}
        self._errors: list[WorkerErrorEvent] = []
        self._draining_nodes: set[str] = set()
        self._hang = ""
        self._hung_worker: WorkerStartedEvent | None = None
        self._hang_detector = HangDetector(
            spec.size, get_hang_timeout(self._run_spec.config), OTHER_RANKS_HEARTBEAT_SECONDS
        )
        self._scaling_policy = ElasticScalingPolicy(self._run_spec.resource_request, spec.size, spec.excluded_nodes)
        self._stop_request = StopRequest.NONE
        self._fit_outcome: list[Any] = []
        self._kill_times: list[float] = []

    def request_stop(self, stop_request: StopRequest) -> None:
        """Send a stop request to the ranks. Any thread, any time."""
        self._control.request_stop.remote(stop_request)

    def resolve_rung(self, step: int, stop_request: StopRequest) -> None:
        """Send the decision on the trial to rank 0, which waits after `step`. Any thread, any time."""
        self._control.resolve_rung.remote(step, stop_request)

    def run_workers(self) -> WorkerGroupResult:
        """Start the workers and follow them to their end. Raises the first ToolkitError that a rank reported."""
        thread = threading.Thread(target=self._run_trainer, daemon=True, name="ray-train")
        thread.start()
        start_time = last_check = time.monotonic()
        while thread.is_alive():
            time.sleep(_EVENT_POLL_SECONDS)
            heartbeats = self._receive_events()
            now = time.monotonic()
            if heartbeats is not None and now - last_check >= _HEALTH_POLL_SECONDS:
                last_check = now
                self._check_health(heartbeats, now)
            if self._kill_times and now - self._kill_times[-1] > _KILL_RETRY_SECONDS:
                self._kill_workers()
            if not self._workers and now - start_time > _START_TIMEOUT_SECONDS:
                raise FitStuckError(
                    f"no worker has started within {_START_TIMEOUT_SECONDS / 60:g} minutes: see `ray status`"
                )
        self._receive_events()
        final = next((error for error in self._errors if error.final), None)
        if final is not None:
            raise rebuild_error(final)
        [ended] = self._fit_outcome
        return WorkerGroupResult(ended if isinstance(ended, dict) else None, self._collect_evidence(ended))

    def _run_trainer(self) -> None:
        try:
            self._fit_outcome.append(_build_trainer(self._spec, self._control).fit().return_value)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: `run_workers` looks at it in the main one
            self._fit_outcome.append(error)

    def _receive_events(self) -> HeartbeatsByRank | None:
        """Show the workers' events; return the heartbeats, or None after killing them if the control actor is lost."""
        if self._control_error is not None:
            return None
        try:
            events, heartbeats = ray.get(self._control.drain_events.remote())
        except ray.exceptions.RayError as error:  # out of memory may have killed this actor's process
            self._control_error = error
            self._kill_workers()
            return None
        for event in events:
            self._handle_event(event)
        return cast(HeartbeatsByRank, heartbeats)

    def _handle_event(self, event: Event) -> None:
        match event:
            case WorkerStartedEvent():
                self._workers[event.rank] = event
            case WorkerErrorEvent():
                self._errors.append(event)
            case StragglerEvent() if event.rank in self._workers:
                event = replace(event, address=self._workers[event.rank].address)
        self._console.show_event(event)

    def _check_health(self, heartbeats: HeartbeatsByRank, now: float) -> None:
        """Check the ranks for a hang and the nodes for changes."""
        self._hang_detector.observe_heartbeats(heartbeats, now)
        if self._hang:
            return
        hang = self._hang_detector.find_hang(now)
        if hang is not None:
            self._handle_hang(hang)
        elif len(self._workers) == self._spec.size:
            with suppress(ray.exceptions.RayError):  # Ray's head is busy or restarting: training continues
                self._check_nodes(now)

    def _check_nodes(self, now: float) -> None:
        self._drain_preempted_nodes()
        if self._scaling_policy.is_check_due(now):
            own = Counter(worker.node for worker in self._workers.values())
            living = nodes.alive_nodes()
            self._run_spec.autoscaler.request_capacity(
                compute_usage_by_others(living, self._run_spec.resource_request, own)
            )
            stop_request = self._scaling_policy.decide_drain(nodes.reachable_nodes(living), own, now)
            if stop_request > self._stop_request:
                self._stop_request = stop_request
                when = "now" if stop_request is StopRequest.DRAIN else "after the next checkpoint"
                self._console.print_line(f"more than {self._spec.size} workers fit now: draining {when}")
                self.request_stop(stop_request)
            elif stop_request is StopRequest.NONE and self._stop_request is StopRequest.DRAIN_AFTER_CHECKPOINT:
                self._stop_request = stop_request
                self._console.print_line("more workers no longer fit: the drain is cancelled")
                self._control.cancel_drain.remote()

    def _drain_preempted_nodes(self) -> None:
        announced = nodes.draining_nodes({worker.node for worker in self._workers.values()})
        for node, deadline in announced.items():
            if node not in self._draining_nodes:
                self._draining_nodes.add(node)
                left = f" in {max(0.0, deadline / 1e3 - time.time()):.0f} s" if deadline else ""
                [address] = {worker.address for worker in self._workers.values() if worker.node == node}
                self._show_warning(f"node {address} will be preempted{left}: saving a checkpoint, then leaving it")
                self.request_stop(StopRequest.DRAIN)

    def _handle_hang(self, hang: HangReport) -> None:
        """Describe the blocking ranks and their current calls, then kill all ranks; `fit` returns as a result."""
        logs = self._run_spec.run.get_log_dir(find_last_attempt(self._run_spec.run))
        paths = {rank: logs / f"rank_{rank}.log" for rank in self._workers}
        log_offsets = {rank: get_log_size(path) for rank, path in paths.items()}
        self._control.report_hang.remote()
        silent = hang.blocking_ranks.keys() if hang.is_silent else set()
        records = [get_flight_record_path(logs, rank) for rank in self._workers.keys() - silent]
        _wait_until(lambda: all(path.exists() for path in records), _FLIGHT_RECORD_SECONDS)
        states = worker_processes.request_worker_stacks(self._workers.values())  # also resumes stopped processes
        _wait_until(lambda: all(find_current_call(paths[rank], log_offsets[rank]) for rank in states), _STACK_SECONDS)
        if len(hang.blocking_ranks) == 1:
            self._hung_worker = self._workers.get(next(iter(hang.blocking_ranks)))
        descriptions = [
            format_hung_rank(
                self._workers[rank], doing, states.get(rank), find_current_call(paths[rank], log_offsets[rank])
            )
            if rank in self._workers
            else f"rank {rank} has not started"
            for rank, doing in hang.blocking_ranks.items()
        ]
        waiting = "; every rank waits for another" if len(descriptions) == self._spec.size > 1 else ""
        others = self._workers.keys() - hang.blocking_ranks.keys()
        exchange = next(
            filter(None, (find_collective_call(paths[rank], log_offsets[rank]) for rank in sorted(others))), ""
        )
        waiting += f"; the others wait in {exchange}" if exchange else ""
        self._hang = (
            f"no rank has advanced for {hang.seconds:.0f} s (failures.hang_timeout = "
            f"{self._run_spec.config.failures.hang_timeout}): "
            f"{'; '.join(descriptions)}{waiting}. The stacks of all threads and the last collectives are in {logs}"
        )
        self._kill_workers()

    def _kill_workers(self) -> None:
        """Kill the processes of all ranks; from the second attempt on, also have Ray kill their actors.

        Raises FitStuckError after `_MAX_KILL_ATTEMPTS`.
        """
        if len(self._kill_times) == _MAX_KILL_ATTEMPTS:
            where = ", ".join(sorted({worker.address for worker in self._workers.values()}))
            cause = self._hang or str(self._control_error)
            raise FitStuckError(f"{cause}. The workers cannot be ended: look after the processes on {where}")
        with suppress(ray.exceptions.RayError):  # an unresponsive node or head: tried again later
            worker_processes.kill_workers(self._workers.values())
            if self._kill_times:
                nodes.release_placement_groups({worker.placement_group for worker in self._workers.values()})
        self._kill_times.append(time.monotonic())

    def _collect_evidence(self, ended: object) -> FailureEvidence:
        """Collect the evidence for `diagnose_failure`, once `fit` has ended."""
        if isinstance(ended, dict):
            return FailureEvidence(self._workers)
        nodes.release_placement_groups({worker.placement_group for worker in self._workers.values()})
        living = {node.id for node in nodes.reachable_nodes(nodes.alive_nodes())}
        return FailureEvidence(
            workers=self._workers,
            errors=self._errors,
            deaths=nodes.dead_actors({rank: worker.actor for rank, worker in self._workers.items()}),
            lost_nodes=frozenset(worker.node for worker in self._workers.values()) - living,
            draining_nodes=frozenset(self._draining_nodes),
            hang=self._hang,
            hung_worker=self._hung_worker,
            out_of_memory_error=next(
                (str(error) for error in (self._control_error, ended) if isinstance(error, OutOfMemoryError)), ""
            ),
            ray_error=str(self._control_error or ended),
            has_stepped=self._hang_detector.has_stepped
            or any(error.phase.startswith("step ") for error in self._errors),
        )

    def _show_warning(self, message: str) -> None:
        self._console.show_event(WarningEvent(message))


def _wait_until(is_met: Callable[[], bool], seconds: float) -> None:
    """Wait until a condition is met, at most for the given seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not is_met():
        time.sleep(_EVENT_POLL_SECONDS)


def _build_trainer(spec: WorkerGroupSpec, control: Any) -> TorchTrainer:  # noqa: ANN401 - Ray's actor handles have no types
    run_spec = spec.run_spec
    gpus = int(run_spec.resource_request.worker_resources.get("GPU", 0))
    timeout = max(900.0, _COLLECTIVE_TIMEOUT_FACTOR * get_hang_timeout(run_spec.config))
    return TorchTrainer(
        worker_main,
        train_loop_config={
            "run": run_spec.run.uri,
            # Their addresses are redacted in resolved.json, and these sections are as the command has them.
            "data": run_spec.config.data.model_dump(mode="json"),
            "eval": run_spec.config.eval.model_dump(mode="json"),
            "control": control,
            "requested_at": spec.requested_at,
            "group_started_at": time.time(),
            "rungs": run_spec.rungs,
        },
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=int(timeout)),
        scaling_config=ScalingConfig(
            num_workers=spec.size,
            use_gpu=bool(gpus),
            resources_per_worker=dict(run_spec.resource_request.worker_resources),
            placement_strategy=run_spec.resource_request.placement.upper(),
            label_selector=nodes.build_exclusion_selector(spec.unschedulable_nodes),
        ),
        run_config=RunConfig(
            # Unique per group, so that Ray finds nothing to restore: it does not hold the toolkit's checkpoints.
            name=f"start_{time.time_ns()}",
            storage_path=str(get_ray_directory(run_spec.run)),
            # Ray's own failure count never resets and has no exceptions.
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": build_worker_environment(run_spec.config)},
        ),
    )
