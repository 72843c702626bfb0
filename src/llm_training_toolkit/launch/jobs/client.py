"""The way to a cluster's jobs: reached, or a message that says why not; and the jobs that are runs of this toolkit."""

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
from llm_training_toolkit.runs.table import format_duration

_NOISY_LOGGERS = ["dashboard.modules.job.sdk", "dashboard.modules.dashboard_sdk", "_private.runtime_env"]
"""Modules of Ray that tell how they upload and connect, and what they leave out."""
RUN_NAME_METADATA = "ltt_run"
"""Where a job's metadata hold the name of its run, which is the key to resume by."""
_STATUS_COLOURS = {
    "pending": "cyan",
    "running": "green",
    "succeeded": "bold green",
    "stopped": "yellow",
    "failed": "red",
}


@dataclass(frozen=True)
class RayJob:
    """A job of the cluster that is a run."""

    id: str
    run: str
    """Its name; empty where it was submitted by `ray job submit`."""
    status: str
    """As Ray says it, in lower case: pending, running, stopped, succeeded, failed."""
    is_over: bool
    entrypoint: str
    message: str
    began: float
    """Seconds since 1970; 0 = not yet."""
    ended: float
    """The same; 0 = not yet."""
    exit_code: int | None
    """Of its driver."""


@contextmanager
def translate_connection_errors(address: str) -> Iterator[None]:
    """Put Ray's complaints about an address or a token into words."""
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
    """Ray says nothing of how it connects and packs, unless it fails."""
    for chatty in _NOISY_LOGGERS:
        logging.getLogger(f"ray.{chatty}").setLevel(logging.ERROR)


def connect_job_client(address: str) -> Any:  # noqa: ANN401 - Ray has no types
    """A client of the cluster's jobs. Raises LaunchError where it cannot be reached, or runs another Ray than here."""
    from ray.job_submission import JobSubmissionClient

    silence_ray_loggers()
    with translate_connection_errors(address):
        client = JobSubmissionClient(address)
    version = client._server_ray_version  # noqa: SLF001 - read when the client checks the connection
    if version != ray.__version__:
        raise LaunchError(
            f"{address} runs Ray {version}, here is Ray {ray.__version__}: install ray=={version} here, or the "
            "cluster's from requirements.txt"
        )
    return client


def list_run_jobs(client: Any) -> list[RayJob]:  # noqa: ANN401
    """The cluster's jobs that are runs of this toolkit, oldest first."""
    found = [_parse_job_details(details) for details in client.list_jobs() if details.submission_id]
    return sorted(
        (job for job in found if job.run or _is_training_command(job.entrypoint)), key=lambda job: (job.began, job.id)
    )


def find_job(client: Any, name: str) -> RayJob:  # noqa: ANN401
    """The newest job of a run's name, or the job of this id. Raises LaunchError with names that are there."""
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
    """Whether a command trains by this toolkit, as `ray job submit -- ltt train …` does."""
    try:
        words = shlex.split(entrypoint)
    except ValueError:
        return False
    return any(word.rsplit("/", maxsplit=1)[-1] == "ltt" for word in words[:2]) and "train" in words


def build_jobs_table(jobs: Iterable[RayJob]) -> Table:
    """One line a job, as `jobs_of` sorts them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "began", "took", "job", "command"):
        table.add_column(title, overflow="fold")
    for job in jobs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.began)) if job.began else ""
        took = format_duration((job.ended or time.time()) - job.began) if job.began else ""
        state = f"[{_STATUS_COLOURS.get(job.status, 'default')}]{job.status}[/]"
        table.add_row(escape(job.run), state, began, took, escape(job.id), escape(job.entrypoint.removeprefix("exec ")))
    return table


def format_jobs_json(jobs: Iterable[RayJob]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [asdict(job) for job in jobs]
