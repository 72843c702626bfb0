"""A run on Ray: the cluster at hand or this machine alone, what the run takes of it, and how a person stops it.

The groups of workers that train one after the other are in `groups.py`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any, NoReturn

import ray
import ray.exceptions

from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray.cluster import cluster, watching
from llm_training_toolkit.launch.ray.resources import wanted_of
from llm_training_toolkit.launch.request import EXIT_CODES
from llm_training_toolkit.launch.signals import on_stop_signal
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import redirect
from llm_training_toolkit.runs.attempts import fail_attempt, last_attempt
from llm_training_toolkit.runs.directory import RunDirectory


def run_on_ray(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train on Ray workers; what `work` returns on rank 0 comes back. Raises ToolkitError."""
    redirect(run.path / "logs" / "driver.log")
    with cluster(console):
        wanted = wanted_of(config, ray.cluster_resources().get("GPU", 0.0), console)
        console.stage("starting workers", 0, 1)
        from llm_training_toolkit.launch.ray.autoscaler import Autoscaler
        from llm_training_toolkit.launch.ray.controller import Groups
        from llm_training_toolkit.launch.ray.worker_group import (  # Ray Train comes with it, and torch with that
            FitStuckError,
            Job,
        )

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
