"""A run on Ray: the cluster at hand or this machine alone, what the run takes of it, and how a person stops it.

The groups of workers that train one after the other are in `groups.py`.
"""

from __future__ import annotations

import importlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import ray
import ray.exceptions

from llm_training_toolkit.config import Config
from llm_training_toolkit.console import Console
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.environment import is_local
from llm_training_toolkit.launch.head import watching
from llm_training_toolkit.launch.outcome import EXIT_CODES
from llm_training_toolkit.launch.output import redirect
from llm_training_toolkit.launch.room import Wanted
from llm_training_toolkit.launch.stopping import on_stop_signal
from llm_training_toolkit.runs import RunDirectory, fail_attempt, last_attempt


@contextmanager
def cluster(console: Console) -> Iterator[None]:
    """The Ray cluster that RAY_ADDRESS names or that this job runs in; otherwise one of this machine alone.

    The connection to a cluster lasts as long as this process, whoever asked for it first: making one takes a second.
    """
    if ray.is_initialized():
        yield
        return
    local = is_local()
    console.stage("starting Ray", 0, 1)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if local:
        options |= {"address": "local", "num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
    # TorchTrainer needs torch, which takes a second to import: the time in which Ray's servers start.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True, name="import-torch").start()
    terminates = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        signal.signal(signal.SIGTERM, terminates)  # Ray's own would exit with a status that says nothing
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        where = "on this machine" if local else f"at RAY_ADDRESS={os.environ['RAY_ADDRESS']}"
        raise LaunchError(f"Ray cannot be reached {where}: {error}. `ray status` shows whether it runs") from error
    console.stage("starting Ray", 1, 1)
    try:
        yield
    finally:
        if local:
            ray.shutdown()


def wanted_of(config: Config, gpus_there: float, console: Console) -> Wanted:
    """The workers to ask for, on a cluster that has so many GPUs now; says so where those are left unused."""
    asked = config.cluster
    if asked.gpus_per_worker == "auto" and 0 < gpus_there < asked.fewest:
        console.say(
            f"note: {gpus_there:g} GPUs for {asked.fewest} workers: training on CPU; cluster.workers={gpus_there:g} "
            "uses them, cluster.gpus_per_worker=1 waits for more"
        )
    return Wanted(asked.fewest, asked.most, resources_of_a_worker(config, gpus_there), asked.placement)


def resources_of_a_worker(config: Config, gpus_there: float) -> dict[str, float]:
    """What one worker takes, on a cluster that has so many GPUs now."""
    gpus = config.cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if gpus_there >= config.cluster.fewest else 0
    return {"CPU": float(config.cluster.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})


def run_on_ray(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train on Ray workers; what `work` returns on rank 0 comes back. Raises ToolkitError."""
    redirect(run.path / "logs" / "driver.log")
    with cluster(console):
        wanted = wanted_of(config, ray.cluster_resources().get("GPU", 0.0), console)
        console.stage("starting workers", 0, 1)
        from llm_training_toolkit.launch.autoscaler import Autoscaler
        from llm_training_toolkit.launch.group import FitStuckError, Job  # Ray Train comes with it, and torch with that
        from llm_training_toolkit.launch.groups import Groups

        groups = Groups(Job(run, config, wanted, Autoscaler(wanted)), console)

        def stop() -> None:
            console.say("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)")
            groups.stop()

        def head_is_gone(why: str) -> None:
            with suppress(OSError, ValueError):
                fail_attempt(run, last_attempt(run), why)
            said = f"error: {why}. The same command goes on from the newest checkpoint once there is a cluster again"
            _leave_at_once(console, said, LaunchError.exit_code)

        def warn(message: str) -> None:
            console.show({"kind": "warning", "message": message})

        try:
            with on_stop_signal(stop), watching(ray.get_runtime_context().gcs_address, warn, head_is_gone):
                return groups.run()
        except FitStuckError as error:
            _leave_at_once(console, f"error: {error}", error.exit_code)
        except KeyboardInterrupt:
            said = "stopped without a checkpoint: the same command goes on from the newest one"
            _leave_at_once(console, said, EXIT_CODES["stopped"])


def _leave_at_once(console: Console, said: str, code: int) -> NoReturn:
    """End this process without taking leave: Ray's own processes and workers end with their driver.

    `ray.shutdown` while `fit` still runs in its thread ends now and then in a segmentation fault.
    """
    console.say(said)
    console.close()
    os._exit(code)
