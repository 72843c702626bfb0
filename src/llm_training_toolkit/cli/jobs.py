"""Verbs `submit` and `jobs`: runs on a remote cluster."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from llm_training_toolkit.cli.options import ConfigFile, Overrides

Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray dashboard: http://HOST:8265", show_default=False),
]
Name = Annotated[str, typer.Argument(help="Name of the run, or id of its job.", show_default=False)]

jobs = typer.Typer(
    help="List, follow, stop and resume runs that are Ray jobs.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    address: Address,
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster file: refuse a run that its largest size cannot hold.")
    ] = None,
    accept: Annotated[list[str] | None, typer.Option(help="As for `ltt train`.")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="As for `ltt train`.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return once it is submitted.")] = False,
) -> None:
    """Train as a Ray job: follow it; Ctrl-C stops it with a checkpoint or detaches; the same command resumes."""
    from llm_training_toolkit.launch.jobs.submit import submit_job
    from llm_training_toolkit.launch.request import TrainRequest
    from llm_training_toolkit.monitoring.console import Console

    _terminate_on_sigterm()
    _enable_keyboard_interrupt()
    request = TrainRequest(config, overrides or (), accept or (), extend)
    raise typer.Exit(submit_job(request, address, cluster, Console(), detach=detach))


@jobs.callback()
def _list_jobs(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray dashboard: http://HOST:8265"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """List the runs that are Ray jobs of a cluster."""
    _enable_keyboard_interrupt()
    if context.invoked_subcommand is not None:
        return
    if address is None:
        raise typer.BadParameter("give --address, or set RAY_API_SERVER_ADDRESS")
    from llm_training_toolkit.cli.tables import print_tables
    from llm_training_toolkit.launch.jobs.client import (
        build_jobs_table,
        connect_job_client,
        format_jobs_json,
        list_run_jobs,
        translate_connection_errors,
    )

    client = connect_job_client(address)
    with translate_connection_errors(address):
        found = list_run_jobs(client)
    if as_json:
        typer.echo(json.dumps(format_jobs_json(found)))
    elif found:
        print_tables(build_jobs_table(found))
    else:
        typer.echo(f"no runs are jobs of {address}")


@jobs.command()
def logs(name: Name, *, address: Address) -> None:
    """Print and follow the output of a run; Ctrl-C detaches, and the end of a pipe that it is written to."""
    from llm_training_toolkit.launch.jobs.client import connect_job_client, find_job
    from llm_training_toolkit.launch.jobs.logs import JobHandle
    from llm_training_toolkit.monitoring.console import Console

    client = connect_job_client(address)
    try:
        code = JobHandle(client, find_job(client, name).id, address, Console()).follow_logs()
    except (KeyboardInterrupt, SystemExit):  # the second is rich's, when nobody reads the pipe any more
        code = 0
    raise typer.Exit(code)


@jobs.command()
def stop(name: Name, *, address: Address) -> None:
    """Stop a run with a checkpoint at its current step, and wait for it."""
    from llm_training_toolkit.launch.jobs.client import connect_job_client, find_job
    from llm_training_toolkit.launch.jobs.logs import JobHandle
    from llm_training_toolkit.launch.jobs.submit import stop_job
    from llm_training_toolkit.launch.request import EXIT_CODES
    from llm_training_toolkit.monitoring.console import Console

    client, console = connect_job_client(address), Console()
    job = find_job(client, name)
    if job.is_over:
        console.print_line(f"{job.run or job.id} is over already: {job.status}")
        return
    code = stop_job(JobHandle(client, job.id, address, console), console)
    stopped = code == EXIT_CODES["stopped"]
    console.print_line(
        f"stopped; `ltt jobs resume {name}` resumes it" if stopped else f"it had ended by itself: exit code {code}"
    )


@jobs.command()
def resume(name: Name, *, address: Address) -> None:
    """Resubmit a run with the command of its newest job, from the folder it was submitted from."""
    from llm_training_toolkit.launch.jobs.submit import resume_job
    from llm_training_toolkit.monitoring.console import Console

    _terminate_on_sigterm()
    raise typer.Exit(resume_job(name, address, Console()))


def _enable_keyboard_interrupt() -> None:
    """Restore SIGINT, which a shell ignores for the background processes of a script."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _terminate_on_sigterm() -> None:
    """Make SIGTERM stop the job: unlike Ctrl-C it cannot ask the user."""
    from llm_training_toolkit.launch.jobs.submit import SigtermInterrupt

    def raise_terminated(_number: int, _frame: object) -> NoReturn:
        raise SigtermInterrupt

    signal.signal(signal.SIGTERM, raise_terminated)
