"""Training function of every Ray Train worker: environment, introduction, heartbeats, one rank's part of the run."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
from ray.train.torch import get_device
from ray.util.metrics import Gauge

from llm_training_toolkit import errors
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import (
    Event,
    NoteEvent,
    StageEvent,
    WorkerErrorEvent,
    WorkerStartedEvent,
)
from llm_training_toolkit.distributed.flight_recorder import build_flight_record_writer
from llm_training_toolkit.distributed.heartbeat import Heartbeat
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.launch.ray.control_actor import (
    build_reporter,
    build_rung_waiter,
    report_with_retry,
    start_heartbeat,
)
from llm_training_toolkit.launch.ray.worker_processes import STACK_SIGNAL
from llm_training_toolkit.runs.storage.open import join_run
from llm_training_toolkit.worker.spec import WorkerSpec


def worker_main(train_loop_config: Mapping[str, Any]) -> dict[str, Any]:
    """Run one rank of the run at `run` (path or URI), with the control actor `control`."""
    faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)  # 2 becomes the rank's log once that exists
    ranks, control = ray.train.get_context(), train_loop_config["control"]
    rank, heartbeat = ranks.get_world_rank(), Heartbeat()
    report = build_reporter(control)
    report_with_retry(control, _build_started_event(rank))
    on_hang = build_flight_record_writer(rank, report)
    stop_request = start_heartbeat(control, rank, heartbeat, on_hang)
    if rank == 0:
        report(StageEvent("starting workers", 1, 1))
    try:
        context = partial(
            RunContext,
            stop_request_reader=stop_request,
            heartbeat=heartbeat,
            rungs=train_loop_config["rungs"],
            rung_waiter=build_rung_waiter(control),
        )
        return _run_worker(train_loop_config, rank, report if rank == 0 else None, context)
    except Exception as error:  # boundary of the worker's process: report before Ray kills it
        traceback.print_exc()
        report_with_retry(
            control,
            _build_error_event(error, rank, heartbeat.get_snapshot().phase),
        )
        raise


def _run_worker(
    train_loop_config: Mapping[str, Any],
    rank: int,
    report: Callable[[Event], None] | None,
    context: Callable[..., RunContext],
) -> dict[str, Any]:
    from llm_training_toolkit.worker.main import run_worker  # imports torch, transformers, DeepSpeed

    def send_note(text: str) -> None:
        if report is not None:
            report(NoteEvent(text))

    with join_run(train_loop_config["run"], send_note) as run:
        resolved = json.loads(run.resolved_config_path.read_text())
        config = parse_config(resolved | {name: train_loop_config[name] for name in ("data", "eval")}, "resolved.json")
        dataset_info = DatasetInfo.from_json(run.dataset_info_path.read_text())
        request_times, node = (
            (train_loop_config["requested_at"], train_loop_config["group_started_at"]),
            ray.util.get_node_ip_address(),
        )
        worker_spec = WorkerSpec(run, config, dataset_info, *request_times, node=node)
        device = get_device()
        if device.type == "cuda":
            # DeepSpeed takes its device from LOCAL_RANK, which differs from Ray's order on nodes with over ten GPUs.
            os.environ["LOCAL_RANK"] = str(device.index)
        context = partial(context, metric_exporter=build_gauge_exporter(run.name))
        return run_worker(worker_spec, context(rank, ray.train.get_context().get_world_size(), device, report))


def _build_started_event(rank: int) -> WorkerStartedEvent:
    """Describe this rank's process."""
    runtime_context, own = ray.get_runtime_context(), psutil.Process()
    return WorkerStartedEvent(
        rank=rank,
        node=runtime_context.get_node_id(),
        address=ray.util.get_node_ip_address(),
        pid=own.pid,
        started=own.create_time(),
        actor=runtime_context.get_actor_id(),
        placement_group=runtime_context.get_placement_group_id(),
    )


def _build_error_event(error: Exception, rank: int, phase: str) -> WorkerErrorEvent:
    """Describe an error for the driver: its message first, then its place in the code."""
    from llm_training_toolkit.worker.micro_batch import SmallerMicroBatch

    final, helped = isinstance(error, ToolkitError), isinstance(error, SmallerMicroBatch)
    if final or helped:
        return WorkerErrorEvent(rank, phase, type(error).__name__, str(error), final=final, helped=helped)
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno}, in {last.name})"
    return WorkerErrorEvent(rank, phase, type(error).__name__, text, final=False, helped=False)


def rebuild_error(event: WorkerErrorEvent) -> ToolkitError:
    """Rebuild a worker's error in its original class."""
    kind = getattr(errors, event.type, ToolkitError)
    error: ToolkitError = kind(event.text)
    return error


def build_worker_environment(config: Config) -> dict[str, str]:
    """Return the environment of every worker; `cluster.env` wins."""
    tools = str(Path(sys.executable).parent)  # ninja, for operations that DeepSpeed compiles
    return {
        "OMP_NUM_THREADS": str(config.cluster.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        **config.cluster.env,
    }


_PREFIX = "ltt_"  # Ray puts ray_ before it


def build_gauge_exporter(run: str) -> Callable[[Mapping[str, float]], None]:
    """Return a function that sets gauges to scalars by metric name, with the run's name as a tag."""
    gauges: dict[str, Gauge] = {}

    def export(values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            if metric not in gauges:
                gauges[metric] = Gauge(get_gauge_name(metric), f"{metric} of the newest step", tag_keys=("run",))
            gauges[metric].set(value, tags={"run": run})

    return export


def get_gauge_name(metric: str) -> str:
    """Return the gauge's name of a metric; Prometheus allows letters, digits and underscores."""
    return _PREFIX + re.sub(r"\W", "_", metric)
