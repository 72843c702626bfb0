"""A run as a Ray job: submit it, follow its log, stop it with a checkpoint.

The job runs the same `ltt train` on the cluster's head; this process only watches. What the driver
there prints is what a local run prints.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_training_toolkit.config import Config, load
from llm_training_toolkit.console import Console
from llm_training_toolkit.errors import LaunchError, PlanError
from llm_training_toolkit.launch.outcome import EXIT_CODES, Request
from llm_training_toolkit.plan import lines, make_plan, require

_STOP_WAIT = "600"
"""Seconds Ray waits after SIGTERM before it kills the driver; its own default of 3 leaves no time for a checkpoint."""
_EXCLUDED = ["/runs/", ".venv/", "venv/", "__pycache__/", "*.safetensors", "*.egg-info/"]
"""Never packed: runs and weights lie on storage that the cluster sees, not in a job's package."""
_RUN_NAME = "ltt_run"


def submit(request: Request, address: str, console: Console) -> int:
    """Submit the run as a job and follow it to its end; its exit code comes back.

    Ctrl-C or SIGTERM here stops the job with a checkpoint. Raises LaunchError when the cluster cannot be
    reached or the run is already going on there, PlanError when the run could not work as a job.
    """
    config = load(request.config, request.overrides)
    plan = require(make_plan(config))
    _check(config, request)
    for line in lines(plan):
        console.say(line)
    with _reachable(address):
        client = _client(address)
        _refuse_running(client, config.run.name)
        job = _submit(client, request, config)
    console.say(f"submitted as job {job} to {address}; Ctrl-C stops it with a checkpoint")
    return _follow(client, job, console)


def _check(config: Config, request: Request) -> None:
    """Refuse what can only fail over there."""
    if not Path(config.run.dir).expanduser().is_absolute():
        raise PlanError(
            f"run.dir = {config.run.dir}: a job works in a copy of this folder that Ray deletes, so its runs would go "
            "with it: give a path that every node sees, for example run.dir=/shared/runs"
        )
    if config.cluster.workers == 0:
        raise PlanError("cluster.workers = 0 means without Ray: give the number of workers")
    if request.config.is_absolute() or ".." in request.config.parts:
        raise PlanError(f"{request.config}: name a file inside the current folder, which is what the job gets")


@contextmanager
def _reachable(address: str) -> Iterator[None]:
    """Put Ray's complaints about an address or a token into words."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise LaunchError(
            f"no job can be submitted to {address}: {first}. The address is that of the dashboard (http://HOST:8265); "
            "a cluster with token authentication wants RAY_AUTH_MODE=token and the token in RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH"
        ) from error


def _client(address: str) -> Any:  # noqa: ANN401 - Ray has no types
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient(address)


def _refuse_running(client: Any, name: str) -> None:  # noqa: ANN401
    """The run's name is the key to resume by: it must not be going on twice."""
    for job in client.list_jobs():
        if (job.metadata or {}).get(_RUN_NAME) == name and not job.status.is_terminal():
            raise LaunchError(
                f"run {name} is going on there as job {job.submission_id}: follow it with "
                f"`ray job logs --follow {job.submission_id}`, or stop it with `ray job stop {job.submission_id}`"
            )


def _submit(client: Any, request: Request, config: Config) -> str:  # noqa: ANN401
    words = ["ltt", "train", str(request.config), *request.overrides]
    words += [word for key in request.accept for word in ("--accept", key)]
    words += ["--extend"] if request.extend else []
    job: str = client.submit_job(
        # `exec`: the shell would be one process more between the stop signal and the driver.
        entrypoint=f"exec {shlex.join(words)}",
        submission_id=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        runtime_env={
            "working_dir": ".",
            "excludes": _EXCLUDED,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_WAIT, **config.cluster.env},
        },
        metadata={_RUN_NAME: config.run.name},
    )
    return job


def _follow(client: Any, job: str, console: Console) -> int:  # noqa: ANN401
    """Show the job's log until it ends; a first interrupt stops the job, a second leaves it alone."""
    try:
        asyncio.run(_show_log(client, job, console))
        return _exit_code(client, job)
    except KeyboardInterrupt:
        console.say(f"stopping job {job} with a checkpoint (Ctrl-C again: let it stop without watching)")
    try:
        client.stop_job(job)
        return _exit_code(client, job)
    except KeyboardInterrupt:
        return EXIT_CODES["stopped"]


async def _show_log(client: Any, job: str, console: Console) -> None:  # noqa: ANN401
    async for text in client.tail_job_logs(job):
        console.say(text.rstrip("\n"))


def _exit_code(client: Any, job: str) -> int:  # noqa: ANN401
    """The driver's exit code: 0 finished, 75 stopped, what it said otherwise."""
    info = client.get_job_info(job)
    while not info.status.is_terminal():
        time.sleep(0.5)
        info = client.get_job_info(job)
    if info.status.value == "SUCCEEDED":
        return 0
    if info.status.value == "STOPPED":
        return EXIT_CODES["stopped"]
    return int(info.driver_exit_code or 1)
