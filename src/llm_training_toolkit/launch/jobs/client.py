"""Job client of a Ray cluster with readable connection errors, and the jobs that are runs of this toolkit."""

from __future__ import annotations

import difflib
import logging
import shlex
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray
from rich.markup import escape
from rich.table import Table

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray.private_api import JOB_CLIENT_LOGGERS, get_server_ray_version
from llm_training_toolkit.runs.table import escape_cell, format_duration

RUN_NAME_METADATA = "ltt_run"  # metadata key of the run's name, by which a run is resumed
_STATUS_COLOURS = {
    "pending": "cyan",
    "running": "green",
    "succeeded": "bold green",
    "stopped": "yellow",
    "failed": "red",
}


@dataclass(frozen=True)
class RayJob:
    """Job of the cluster that is a run of this toolkit."""

    id: str
    run: str
    """Name of the run; empty if it was submitted by `ray job submit`."""
    status: str
    """Ray's job status in lower case: pending, running, stopped, succeeded, failed."""
    is_over: bool
    entrypoint: str
    message: str
    began: float
    """Seconds since 1970; 0 = not started."""
    ended: float
    """Seconds since 1970; 0 = not ended."""
    exit_code: int | None
    """Exit code of the driver."""


@contextmanager
def translate_connection_errors(address: str) -> Iterator[None]:
    """Turn Ray's errors about an address or a token into a LaunchError with advice."""
    from ray.exceptions import RayError

    try:
        yield
    except (RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise LaunchError(
            f"the jobs of {address} cannot be reached: {first}. It is the address of the dashboard (http://HOST:8265), "
            "which needs ray[default] on the head; a cluster with token authentication wants RAY_AUTH_MODE=token and "
            "the token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        ) from error


def silence_ray_loggers() -> None:
    """Silence Ray's messages about connecting and packing, except errors."""
    for name in JOB_CLIENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def connect_job_client(address: str) -> Any:  # noqa: ANN401 - Ray has no types
    """Return a job client. Raises LaunchError if the cluster is unreachable or runs another Ray version than here."""
    from ray.job_submission import JobSubmissionClient

    silence_ray_loggers()
    with translate_connection_errors(address):
        client = JobSubmissionClient(address)
    version = get_server_ray_version(client)
    if version != ray.__version__:
        raise LaunchError(
            f"{address} runs Ray {version}, here is Ray {ray.__version__}: install ray=={version} here, or the "
            "cluster's from requirements.txt"
        )
    return client


def list_run_jobs(client: Any) -> list[RayJob]:  # noqa: ANN401
    """Return the cluster's jobs that are runs of this toolkit, oldest first."""
    found = [_parse_job_details(details) for details in client.list_jobs() if details.submission_id]
    return sorted(
        (job for job in found if job.run or _is_training_command(job.entrypoint)), key=lambda job: (job.began, job.id)
    )


def find_job(client: Any, name: str) -> RayJob:  # noqa: ANN401
    """Return the newest job of a run's name, or the job with this id. Raises LaunchError with the known names."""
    known = list_run_jobs(client)
    matching = [job for job in known if name in {job.run, job.id}]
    if matching:
        return matching[-1]
    names = sorted({job.run or job.id for job in known})
    near = difflib.get_close_matches(name, names, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names) or 'none'}"
    raise LaunchError(f"no job there is the run {name}; {hint}")


def _parse_job_details(details: Any) -> RayJob:  # noqa: ANN401
    return RayJob(
        id=details.submission_id,
        run=(details.metadata or {}).get(RUN_NAME_METADATA, ""),
        status=details.status.value.lower(),
        is_over=details.status.is_terminal(),
        entrypoint=details.entrypoint,
        message=details.message or "",
        began=(details.start_time or 0) / 1e3,
        ended=(details.end_time or 0) / 1e3,
        exit_code=details.driver_exit_code,
    )


def _is_training_command(entrypoint: str) -> bool:
    """Return whether a command trains with this toolkit, as `ray job submit -- ltt train …` does."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return False
    return any(word.rsplit("/", maxsplit=1)[-1] == "ltt" for word in words[:2]) and "train" in words


def build_jobs_table(jobs: Iterable[RayJob]) -> Table:
    """Return a table with one line per job, in the given order."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "began", "took", "job", "command"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else ""
        took = format_duration((job.ended or time.time()) - job.began) if job.began else ""
        state = f"[{_STATUS_COLOURS.get(job.status, 'default')}]{job.status}[/]"
        table.add_row(
            escape(job.run), state, began, took, escape(job.id), escape_cell(job.entrypoint.removeprefix("exec "))
        )
    return table


def format_jobs_json(jobs: Iterable[RayJob]) -> list[dict[str, Any]]:
    """Return the jobs as plain data, for programs."""
    return [asdict(job) for job in jobs]
