"""Run on a Ray cluster or on this machine: connection, resource request and stop signals.

`controller.py` starts the successive worker groups.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NoReturn

import ray
import ray.exceptions

from llm_training_toolkit.config import Config
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster, get_raylet_address, watch_head, watch_raylet
from llm_training_toolkit.launch.ray.resources import build_resource_request
from llm_training_toolkit.launch.request import EXIT_CODES, build_failure_json, build_interrupted_json
from llm_training_toolkit.launch.signals import on_stop_signal
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import redirect_output
from llm_training_toolkit.runs.attempts import fail_attempt, find_last_attempt
from llm_training_toolkit.runs.directory import RunDirectory


def run_on_ray(run: RunDirectory, config: Config, console: Console) -> dict[str, Any]:
    """Train on Ray workers; return the result of `run_worker` on rank 0. Raises ToolkitError."""
    redirect_output(run.driver_log_path)
    with connect_to_cluster(console):
        resource_request = build_resource_request(config, ray.cluster_resources().get("GPU", 0.0), console)
        console.update_stage("starting workers", 0, 1)
        from llm_training_toolkit.launch.ray.capacity import AutoscalerClient
        from llm_training_toolkit.launch.ray.controller import TrainController
        from llm_training_toolkit.launch.ray.worker_group import (  # imports Ray Train, and with it torch
            FitStuckError,
            RunSpec,
        )

        previous_attempt = find_last_attempt(run)
        controller = TrainController(
            RunSpec(run, config, resource_request, AutoscalerClient(resource_request)), console
        )

        def request_stop() -> None:
            console.print_line("stopping after this step, with a checkpoint (Ctrl-C again: at once, without)")
            controller.request_stop()

        def handle_lost_cluster(why: str) -> None:
            with suppress(OSError, ValueError):
                if (attempt := find_last_attempt(run)) > previous_attempt:
                    fail_attempt(run, attempt, why)
            remedy = "The same command resumes from the latest checkpoint once there is a cluster again"
            exit_after_error(LaunchError(f"{why}. {remedy}"))

        def exit_after_error(error: LaunchError) -> NoReturn:
            _exit_immediately(console, f"error: {error}", error.exit_code, build_failure_json(error))

        def show_warning(message: str) -> None:
            console.show_event(WarningEvent(message))

        try:
            with (
                on_stop_signal(request_stop),
                watch_head(ray.get_runtime_context().gcs_address, show_warning, handle_lost_cluster),
                watch_raylet(get_raylet_address(), handle_lost_cluster),
            ):
                return controller.run_training()
        except FitStuckError as error:
            exit_after_error(error)
        except KeyboardInterrupt:
            message = "stopped without a checkpoint: the same command resumes from the latest one"
            _exit_immediately(console, message, EXIT_CODES["stopped"], build_interrupted_json(config))


def _exit_immediately(console: Console, message: str, code: int, result: Mapping[str, Any]) -> NoReturn:
    """Exit without cleanup: Ray's processes and workers end with their driver.

    `ray.shutdown` occasionally ends in a segmentation fault while `fit` still runs in its thread.
    """
    console.print_line(message)
    console.print_result(result)
    console.close()
    os._exit(code)
