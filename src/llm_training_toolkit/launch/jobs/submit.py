"""Run as a Ray job: submit, follow, stop with a checkpoint, resume.

The job runs the same `ltt train` on the cluster's head and prints the same as a local run; this process only watches.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.config import Config, load_config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.errors import LaunchError, PlanError
from llm_training_toolkit.launch.jobs.client import (
    RUN_NAME_METADATA,
    RayJob,
    connect_job_client,
    find_job,
    list_run_jobs,
    silence_ray_loggers,
    translate_connection_errors,
)
from llm_training_toolkit.launch.jobs.logs import JobHandle
from llm_training_toolkit.launch.jobs.package import (
    check_no_shadowing_modules,
    check_package_size,
    find_excluded_secrets,
    get_exclude_patterns,
)
from llm_training_toolkit.launch.request import EXIT_CODES, TrainRequest
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import (
    Plan,
    check_plan,
    estimate_on_cluster,
    format_plan,
    make_plan,
    resolve_for_hardware,
)
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware
from llm_training_toolkit.setup.hub_weights import ask_for_plan
from llm_training_toolkit.setup.stored_plan import recall_stored_plan

_STOP_TIMEOUT_SECONDS = "600"  # from SIGTERM to SIGKILL; Ray's default of 3 s leaves no time for a checkpoint
_MAX_LISTED = 8  # files that stay here and are named
_TRAIN_COMMAND = ["exec", "ltt", "train"]  # `exec`: no shell process between the stop signal and the driver


class SigtermInterrupt(KeyboardInterrupt):
    """SIGTERM while following a job: unlike Ctrl-C, it stops the run without a question."""


def submit_job(
    request: TrainRequest, address: str, cluster: Path | None, console: Console, *, detach: bool = False
) -> int:
    """Submit the run as a job, follow it to its end and return its exit code; with `detach` return 0 at once.

    `cluster` is a cluster file that the run must fit. Raises LaunchError if the cluster is unreachable or the run is
    already running there, PlanError if the run could not work as a job.
    """
    config = load_config(request.config, request.overrides)
    for line in format_plan(_check_job_plan(config, request, cluster)):
        console.print_line(line)
    silence_ray_loggers()
    left_out = get_exclude_patterns(config, Path.cwd())
    check_no_shadowing_modules(Path.cwd(), left_out)
    carried = check_package_size(Path.cwd(), left_out)
    if secret := find_excluded_secrets(Path.cwd(), left_out):
        console.print_line(
            f"left out of the job, as hidden or named like a key: {', '.join(secret[:_MAX_LISTED])}"
            + (f" and {len(secret) - _MAX_LISTED} more" if len(secret) > _MAX_LISTED else "")
        )
    client = connect_job_client(address)
    with translate_connection_errors(address):
        _check_not_running(client, config.run.name)
        job = _submit_entrypoint(client, request, config, left_out)
    console.print_line(f"submitted as job {job} to {address}, with {carried} of this folder")
    if detach:
        at = "" if address == os.environ.get("RAY_API_SERVER_ADDRESS") else f" --address {address}"
        follow, stop = (f"`ltt jobs {verb} {config.run.name}{at}`" for verb in ("logs", "stop"))
        console.print_line(f"{follow} follows it, {stop} stops it")
        return 0
    console.print_line("Ctrl-C: stop it with a checkpoint, or leave it alone")
    return follow_job(JobHandle(client, job, address, console), config.run.name, console)


def resume_job(name: str, address: str, console: Console) -> int:
    """Resubmit a stopped run with the command of its newest job, and follow it.

    Raises LaunchError if it is running, or was submitted from another folder than this one.
    """
    job = find_job(connect_job_client(address), name)
    request = parse_train_request(job)
    if not request.config.is_file():
        raise LaunchError(
            f"{request.config} is not in this folder: resume {job.run or job.id} from the folder it was submitted from"
        )
    return submit_job(request, address, None, console)


def follow_job(log: JobHandle, name: str, console: Console) -> int:
    """Print the job's log until it ends. Ctrl-C asks for an action, SIGTERM stops the run."""
    while True:
        try:
            return log.follow_logs()
        except KeyboardInterrupt as interrupt:
            answer = "stop" if isinstance(interrupt, SigtermInterrupt) else _ask_interrupt_action(console)
        if answer == "detach":
            console.print_line(f"the run continues; `ltt jobs logs {name}` follows it again")
            return 0
        if answer == "stop":
            return stop_job(log, console)


def stop_job(log: JobHandle, console: Console) -> int:
    """Stop the job with a checkpoint and wait for its end. Another interrupt ends only the waiting."""
    console.print_line("stopping with a checkpoint (Ctrl-C: let it stop without watching)")
    try:
        log.request_stop()
        return log.wait_for_exit()
    except KeyboardInterrupt:
        return EXIT_CODES["stopped"]


def parse_train_request(job: RayJob) -> TrainRequest:
    """Parse the `ltt train` command of a job. Raises LaunchError for a command that `ltt submit` did not write."""
    words = shlex.split(job.entrypoint)
    if words[:3] != _TRAIN_COMMAND or len(words) == len(_TRAIN_COMMAND):
        raise LaunchError(f"job {job.id} was not submitted by `ltt submit`, but as: {job.entrypoint}")
    config, *rest = words[3:]
    overrides = list(takewhile(lambda word: not word.startswith("--"), rest))
    accept = [value for option, value in pairwise(rest) if option == "--accept"]
    return TrainRequest(Path(config), overrides, accept, extend="--extend" in rest)


def _ask_interrupt_action(console: Console) -> Literal["stop", "detach", "follow"]:
    """Ask for the action after Ctrl-C; without a keyboard it is "stop"."""
    if not sys.stdin.isatty():
        return "stop"
    console.print_line("[s]top the run with a checkpoint, [d]etach and let it run, or [f]ollow further?")
    try:
        answer = input().strip().lower()
    except (KeyboardInterrupt, EOFError):
        return "detach"
    return "stop" if answer.startswith("s") else "follow" if answer.startswith("f") else "detach"


def _check_job_plan(config: Config, request: TrainRequest, cluster: Path | None) -> Plan:
    """Return the plan, after checks for all that would only fail on the cluster. Raises PlanError."""
    config = recall_stored_plan(config)
    ask_for_plan(config)
    plan = check_plan(make_plan(config) if cluster is None else _plan_on_cluster(config, cluster))
    if not is_uri(config.run.dir) and not Path(config.run.dir).expanduser().is_absolute():
        raise PlanError(
            f"run.dir = {config.run.dir}: a job works in a copy of this folder that Ray deletes, so its runs would go "
            "with it: give a path that every node sees, for example run.dir=/shared/runs"
        )
    if config.cluster.workers == 0:
        raise PlanError("cluster.workers = 0 means without Ray: give the number of workers")
    if request.config.is_absolute() or ".." in request.config.parts:
        raise PlanError(f"{request.config}: name a file inside the current folder, which is what the job gets")
    return plan


def _plan_on_cluster(config: Config, cluster: Path) -> Plan:
    """Return the plan on the hardware of a cluster file, with its time and cost."""
    hardware = read_hardware(cluster)
    config, resolved = resolve_for_hardware(config, hardware)
    plan = make_plan(config).with_notes(resolved)
    return estimate_on_cluster(config, plan, hardware).add_to_plan(plan)


def _check_not_running(client: Any, name: str) -> None:  # noqa: ANN401 - Ray has no types
    """Check that the run is not running already: its name is the key to resume by. Raises LaunchError."""
    for job in list_run_jobs(client):
        if job.run == name and not job.is_over:
            raise LaunchError(
                f"run {name} is running there as job {job.id}: follow it with `ltt jobs logs {name}`, or stop it with "
                f"`ltt jobs stop {name}`"
            )


def _submit_entrypoint(client: Any, request: TrainRequest, config: Config, left_out: list[str]) -> str:  # noqa: ANN401
    words = ["ltt", "train", str(request.config), *request.overrides]
    words += [word for key in request.accept for word in ("--accept", key)]
    words += ["--extend"] if request.extend else []
    job: str = client.submit_job(
        entrypoint=shlex.join([_TRAIN_COMMAND[0], *words]),
        submission_id=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        runtime_env={
            "working_dir": ".",
            "excludes": left_out,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_TIMEOUT_SECONDS, **config.cluster.env},
        },
        metadata={RUN_NAME_METADATA: config.run.name},
    )
    return job
