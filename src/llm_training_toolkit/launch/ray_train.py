"""A run on Ray: workers through Ray Train's TorchTrainer, on the cluster at hand or on this machine alone.

The driver starts the workers in a thread and meanwhile shows what they tell and passes on the wish to
stop. Ray restarts workers that die; a ToolkitError is final, because a restart would meet it again.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import ray
import ray.exceptions

from llm_training_toolkit import errors
from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.console import Console
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.errors import LaunchError, ToolkitError
from llm_training_toolkit.launch.control import open_line, reporter, stop_watch
from llm_training_toolkit.launch.environment import is_local, too_many
from llm_training_toolkit.launch.outcome import EXIT_CODES
from llm_training_toolkit.launch.output import redirect
from llm_training_toolkit.launch.place import Place
from llm_training_toolkit.launch.restarts import Restarts
from llm_training_toolkit.launch.stopping import on_stop_signal
from llm_training_toolkit.runs import RunDirectory, last_attempt

_COLLECTIVE_TIMEOUT = 900
_STARTUP_FAILURES = 3
"""Ray's default is to try for ever."""


@contextmanager
def cluster(console: Console) -> Iterator[None]:
    """The Ray cluster that RAY_ADDRESS names or that this job runs in; otherwise one of this machine alone."""
    local = is_local()
    console.stage("starting Ray", 0, 1)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if local:
        options |= {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    # TorchTrainer needs torch, which takes a second to import: the time in which Ray's servers start.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True, name="import-torch").start()
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        where = "on this machine" if local else f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise LaunchError(f"Ray cannot be reached {where}: {error}. `ray status` shows whether it runs") from error
    console.stage("starting Ray", 1, 1)
    try:
        yield
    finally:
        ray.shutdown()


def _gpus_per_worker(config: Config, resources: Mapping[str, float], console: Console) -> int:
    """GPUs a worker takes; checks on the way that the cluster has what the run asks for."""
    workers, gpus = config.cluster.workers, resources.get("GPU", 0.0)
    if resources.get("CPU", 0.0) < workers * config.cluster.cpus_per_worker:
        raise LaunchError(too_many(config, f"the cluster has {resources.get('CPU', 0.0):g}"))
    if config.cluster.gpus_per_worker == "auto":
        if 0 < gpus < workers:
            console.say(
                f"note: {gpus:g} GPUs for {workers} workers: training on CPU; cluster.workers={gpus:g} uses them"
            )
        return 1 if gpus >= workers else 0
    if gpus < workers * config.cluster.gpus_per_worker:
        raise LaunchError(
            f"cluster.workers = {workers} with {config.cluster.gpus_per_worker} GPU each: the cluster has {gpus:g} "
            "GPUs; lower cluster.workers, or set cluster.gpus_per_worker to 0"
        )
    return config.cluster.gpus_per_worker


def run_on_ray(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train on Ray workers; what `work` returns on rank 0 comes back. Raises ToolkitError."""
    redirect(run.path / "logs" / "driver.log")
    with cluster(console):
        gpus = _gpus_per_worker(config, ray.cluster_resources(), console)
        line = open_line()
        trainer = _trainer(run, config, gpus, line)
        console.stage("starting workers", 0, 1)
        try:
            with on_stop_signal(lambda: _wish_to_stop(line, console)):
                return _result(run, line, _watch(trainer, line, console))
        except KeyboardInterrupt:
            _leave_at_once(console)


def _leave_at_once(console: Console) -> NoReturn:
    """End this process without taking leave: Ray's own processes and workers end with their driver.

    `ray.shutdown` while `fit` still runs in its thread ends now and then in a segmentation fault.
    """
    console.say("stopped without a checkpoint: the same command goes on from the newest one")
    console.close()
    os._exit(EXIT_CODES["stopped"])


def _wish_to_stop(line: Any, console: Console) -> None:  # noqa: ANN401
    console.say("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)")
    line.ask_to_stop.remote()


def _trainer(run: RunDirectory, config: Config, gpus: int, line: Any) -> Any:  # noqa: ANN401
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": config.cluster.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    # Ray keeps no checkpoints of ours: a name of its own for every start, so that it finds nothing to restore.
    name = f"start_{time.time_ns()}"
    return TorchTrainer(
        worker_main,
        train_loop_config={"run": str(run.path), "line": line},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_COLLECTIVE_TIMEOUT),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=bool(gpus),
            resources_per_worker=resources,
            placement_strategy=config.cluster.placement.upper(),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run.path / "logs" / "ray"),
            # Ray's own count never refills and knows no exception; `Restarts` keeps ours.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=_STARTUP_FAILURES),
            worker_runtime_env={"env_vars": _worker_environment(config)},
            callbacks=[Restarts(line, config.failures.max)],
        ),
    )


def _worker_environment(config: Config) -> dict[str, str]:
    """Environment of every worker; what the configuration names wins."""
    tools = str(Path(sys.executable).parent)  # ninja, for the operations DeepSpeed compiles
    return {
        "OMP_NUM_THREADS": str(config.cluster.cpus_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        **config.cluster.env,
    }


def _watch(trainer: Any, line: Any, console: Console) -> Any:  # noqa: ANN401
    """Show what the workers tell until they are done: what `fit` gave or raised.

    Raises the first error a worker reports that is final.
    """
    ended: list[Any] = []

    def fit() -> None:
        try:
            ended.append(trainer.fit().return_value)
        except Exception as error:  # noqa: BLE001 - the edge of a thread: `_result` says it in the main one
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True, name="ray-train")
    thread.start()
    final: Mapping[str, Any] | None = None
    told = 0
    while True:
        alive = thread.is_alive()
        for event in ray.get(line.take.remote()):
            if event["kind"] == "error":
                if event["final"]:
                    final = final or event
                # The first rank to fail of an attempt is the cause; the others lose their connection to it.
                elif event["attempt"] != told:
                    told = event["attempt"]
                    console.show(_as_warning(event))
            console.show(event)
        if not alive:
            break
        time.sleep(0.2)
    if final is not None:
        raise _as_error(final)
    return ended[0]


def _result(run: RunDirectory, line: Any, ended: Any) -> dict[str, Any]:  # noqa: ANN401 - what Ray gave
    """What the workers returned. Raises LaunchError with the reason why there is nothing."""
    if isinstance(ended, dict):
        return ended
    why = ray.get(line.last_answer.remote()) or f"Ray ended the run: {ended}"
    raise LaunchError(f"{why}; the same command goes on from the newest checkpoint. Logs: {run.path / 'logs'}")


def _as_warning(event: Mapping[str, Any]) -> Mapping[str, Any]:
    message = f"rank {event['rank']} failed ({event['text']}); Ray restarts the workers from the newest checkpoint"
    return {"kind": "warning", "message": message}


def _as_error(event: Mapping[str, Any]) -> ToolkitError:
    """The worker's error again, of the class it had there."""
    kind = getattr(errors, str(event["type"]), ToolkitError)
    error: ToolkitError = kind(str(event["text"]))
    return error


def _quiet(_event: object) -> None:
    """Ranks other than the first say nothing."""


def worker_main(assignment: Mapping[str, Any]) -> dict[str, Any]:
    """What Ray Train runs on every worker."""
    import ray.train
    from ray.train.torch import get_device

    from llm_training_toolkit.launch.sizing import SmallerMicroBatch
    from llm_training_toolkit.launch.worker import work

    ranks = ray.train.get_context()
    rank = ranks.get_world_rank()
    report = reporter(assignment["line"])
    run = RunDirectory(Path(assignment["run"]))
    if rank == 0:
        report({"kind": "started"})
        report({"kind": "stage", "name": "starting workers", "done": 1, "total": 1})
    try:
        place = Place(run, from_json(run.resolved.read_text()), Receipt.from_json(run.receipt.read_text()))
        stop = stop_watch(assignment["line"]) if rank == 0 else bool
        if get_device().type == "cuda":
            # DeepSpeed takes its device from LOCAL_RANK, which differs from Ray's order on nodes with over ten GPUs.
            os.environ["LOCAL_RANK"] = str(get_device().index)
        context = RunContext(rank, ranks.get_world_size(), get_device(), report if rank == 0 else _quiet, stop)
        return work(place, context)
    except Exception as error:  # the edge of a worker's process: the driver is told before Ray takes it down
        final, helped = isinstance(error, ToolkitError), isinstance(error, SmallerMicroBatch)
        text = str(error) if final or helped else f"{type(error).__name__}: {error}"
        traceback.print_exc()
        kind = {"type": type(error).__name__, "text": text, "final": final, "helped": helped}
        told = {"rank": rank, "attempt": last_attempt(run), **kind}
        ray.get(assignment["line"].post.remote({"kind": "error", **told}))
        raise
