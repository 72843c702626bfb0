"""A run as a Ray job: submitted, followed, stopped with a checkpoint, resumed.

The job runs the same `ltt train` on the cluster's head; this process only watches. What the driver there prints is
what a local run prints.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.config import Config, load
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.errors import LaunchError, PlanError
from llm_training_toolkit.launch.jobs.client import RUN_NAME, Job, connect, find, jobs_of, quiet, reachable
from llm_training_toolkit.launch.jobs.logs import Log
from llm_training_toolkit.launch.jobs.package import excluded, what_travels
from llm_training_toolkit.launch.request import EXIT_CODES, Request
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.plan import Plan, lines, make_plan, on_cluster, require, resolved_on
from llm_training_toolkit.plan.cluster_file import read_hardware

_STOP_WAIT = "600"
"""Seconds Ray waits after SIGTERM before it kills the driver; its own default of 3 leaves no time for a checkpoint."""
_TRAIN = ["exec", "ltt", "train"]
"""`exec`: the shell would be one process more between the stop signal and the driver."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: nobody is there to be asked."""


def submit(request: Request, address: str, cluster: Path | None, console: Console) -> int:
    """Submit the run as a job and follow it to its end; its exit code comes back.

    `cluster` is a cluster file that the run must fit. Raises LaunchError when the cluster cannot be reached or the run
    is already going on there, PlanError when the run could not work as a job.
    """
    config = load(request.config, request.overrides)
    for line in lines(_checked(config, request, cluster)):
        console.say(line)
    quiet()
    left_out = excluded(config, Path.cwd())
    carried = what_travels(Path.cwd(), left_out)
    client = connect(address)
    with reachable(address):
        _refuse_running(client, config.run.name)
        job = _submit(client, request, config, left_out)
    console.say(f"submitted as job {job} to {address}, with {carried} of this folder")
    console.say("Ctrl-C: stop it with a checkpoint, or leave it alone")
    return follow(Log(client, job, address, console), config.run.name, console)


def resume(name: str, address: str, console: Console) -> int:
    """Submit a run that has stopped once more, with the command of its newest job, and follow it.

    Raises LaunchError when it is going on, or was submitted from another folder than this one.
    """
    job = find(connect(address), name)
    request = request_of(job)
    if not request.config.is_file():
        raise LaunchError(
            f"{request.config} is not in this folder: resume {job.run or job.id} from the folder it was submitted from"
        )
    return submit(request, address, None, console)


def follow(log: Log, name: str, console: Console) -> int:
    """Show the job's log until it ends; Ctrl-C asks what to do, SIGTERM stops the run."""
    while True:
        try:
            return log.follow()
        except KeyboardInterrupt as interrupt:
            answer = "stop" if isinstance(interrupt, Terminated) else _asked(console)
        if answer == "detach":
            console.say(f"the run goes on; `ltt jobs logs {name}` follows it again")
            return 0
        if answer == "stop":
            return stop(log, console)


def stop(log: Log, console: Console) -> int:
    """Stop the job with a checkpoint and wait for its end; a further interrupt lets it stop without watching."""
    console.say("stopping with a checkpoint (Ctrl-C: let it stop without watching)")
    try:
        log.stop()
        return log.wait()
    except KeyboardInterrupt:
        return EXIT_CODES["stopped"]


def request_of(job: Job) -> Request:
    """What `ltt train` was asked for by the job. Raises LaunchError for a command that this toolkit did not submit."""
    words = shlex.split(job.entrypoint)
    if words[:3] != _TRAIN or len(words) == len(_TRAIN):
        raise LaunchError(f"job {job.id} was not submitted by `ltt submit`, but as: {job.entrypoint}")
    config, *rest = words[3:]
    overrides = list(takewhile(lambda word: not word.startswith("--"), rest))
    accept = [value for option, value in pairwise(rest) if option == "--accept"]
    return Request(Path(config), overrides, accept, extend="--extend" in rest)


def _asked(console: Console) -> Literal["stop", "detach", "follow"]:
    """What to do with the run; without a keyboard, stop it."""
    if not sys.stdin.isatty():
        return "stop"
    console.say("[s]top the run with a checkpoint, [d]etach and let it go on, or [f]ollow further?")
    try:
        answer = input().strip().lower()
    except (KeyboardInterrupt, EOFError):
        return "detach"
    return "stop" if answer.startswith("s") else "follow" if answer.startswith("f") else "detach"


def _checked(config: Config, request: Request, cluster: Path | None) -> Plan:
    """The plan, once nothing is in it that can only fail over there."""
    plan = make_plan(config)
    if cluster is not None:
        hardware = read_hardware(cluster)
        config = resolved_on(config, hardware)
        plan = make_plan(config)
        plan = on_cluster(config, plan, hardware).added_to(plan)
    require(plan)
    if not is_address(config.run.dir) and not Path(config.run.dir).expanduser().is_absolute():
        raise PlanError(
            f"run.dir = {config.run.dir}: a job works in a copy of this folder that Ray deletes, so its runs would go "
            "with it: give a path that every node sees, for example run.dir=/shared/runs"
        )
    if config.cluster.workers == 0:
        raise PlanError("cluster.workers = 0 means without Ray: give the number of workers")
    if request.config.is_absolute() or ".." in request.config.parts:
        raise PlanError(f"{request.config}: name a file inside the current folder, which is what the job gets")
    return plan


def _refuse_running(client: Any, name: str) -> None:  # noqa: ANN401 - Ray has no types
    """The run's name is the key to resume by: it must not be going on twice."""
    for job in jobs_of(client):
        if job.run == name and not job.is_over:
            raise LaunchError(
                f"run {name} is going on there as job {job.id}: follow it with `ltt jobs logs {name}`, or stop it with "
                f"`ltt jobs stop {name}`"
            )


def _submit(client: Any, request: Request, config: Config, left_out: list[str]) -> str:  # noqa: ANN401
    words = ["ltt", "train", str(request.config), *request.overrides]
    words += [word for key in request.accept for word in ("--accept", key)]
    words += ["--extend"] if request.extend else []
    job: str = client.submit_job(
        entrypoint=shlex.join([_TRAIN[0], *words]),
        submission_id=f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}",
        runtime_env={
            "working_dir": ".",
            "excludes": left_out,
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_WAIT, **config.cluster.env},
        },
        metadata={RUN_NAME: config.run.name},
    )
    return job
