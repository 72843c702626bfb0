"""The verbs `submit` and `jobs`: runs on a cluster elsewhere."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, NoReturn

import typer

Address = Annotated[
    str,
    typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://HOST:8265", show_default=False),
]
Name = Annotated[str, typer.Argument(help="The run's name, or the id of its job.", show_default=False)]

jobs = typer.Typer(
    help="Runs that are jobs of a cluster: list them, follow, stop with a checkpoint, resume.",
    invoke_without_command=True,
    rich_markup_mode=None,
)


def submit(
    config: Annotated[Path, typer.Argument(help="The YAML file that describes the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Single fields, as key=value: train.steps=100", show_default=False)
    ] = None,
    *,
    address: Address,
    cluster: Annotated[
        Path | None, typer.Option(help="The cluster's file: refuse a run that its largest size does not hold.")
    ] = None,
    accept: Annotated[list[str] | None, typer.Option(help="As for `ltt train`.")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="As for `ltt train`.")] = False,
) -> None:
    """Train as a Ray job on a cluster: follow it; Ctrl-C stops it with a checkpoint or leaves it; the same resumes."""
    from llm_training_toolkit.launch.jobs.submit import submit as submit_job
    from llm_training_toolkit.launch.request import Request
    from llm_training_toolkit.monitoring.console import Console

    _end_on_sigterm()
    _hear_interrupts()
    request = Request(config, overrides or (), accept or (), extend)
    raise typer.Exit(submit_job(request, address, cluster, Console()))


@jobs.callback()
def _list(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard: http://HOST:8265"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """List the runs that are jobs of a cluster."""
    _hear_interrupts()
    if context.invoked_subcommand is not None:
        return
    if address is None:
        raise typer.BadParameter("give --address, or set RAY_API_SERVER_ADDRESS")
    from rich.console import Console as Terminal

    from llm_training_toolkit.launch.jobs.client import connect, jobs_json, jobs_of, jobs_table, reachable

    client = connect(address)
    with reachable(address):
        found = jobs_of(client)
    if as_json:
        typer.echo(json.dumps(jobs_json(found)))
    elif found:
        Terminal(highlight=False).print(jobs_table(found))
    else:
        typer.echo(f"no runs are jobs of {address}")


@jobs.command()
def logs(name: Name, *, address: Address) -> None:
    """Show what a run prints, from its beginning, and follow it while it goes on; Ctrl-C leaves it alone."""
    from llm_training_toolkit.launch.jobs.client import connect, find
    from llm_training_toolkit.launch.jobs.logs import Log
    from llm_training_toolkit.monitoring.console import Console

    client = connect(address)
    try:
        code = Log(client, find(client, name).id, address, Console()).follow()
    except KeyboardInterrupt:
        code = 0
    raise typer.Exit(code)


@jobs.command()
def stop(name: Name, *, address: Address) -> None:
    """Stop a run with a checkpoint at its current step, and wait until it has."""
    from llm_training_toolkit.launch.jobs.client import connect, find
    from llm_training_toolkit.launch.jobs.logs import Log
    from llm_training_toolkit.launch.jobs.submit import stop as stop_job
    from llm_training_toolkit.launch.request import EXIT_CODES
    from llm_training_toolkit.monitoring.console import Console

    client, console = connect(address), Console()
    job = find(client, name)
    if job.is_over:
        console.say(f"{job.run or job.id} is over already: {job.status}")
        return
    code = stop_job(Log(client, job.id, address, console), console)
    stopped = code == EXIT_CODES["stopped"]
    console.say(
        f"stopped; `ltt jobs resume {name}` goes on" if stopped else f"it had ended by itself: exit code {code}"
    )


@jobs.command()
def resume(name: Name, *, address: Address) -> None:
    """Submit a run once more, with the command of its newest job, from the folder it was submitted from."""
    from llm_training_toolkit.launch.jobs.submit import resume as resume_job
    from llm_training_toolkit.monitoring.console import Console

    _end_on_sigterm()
    raise typer.Exit(resume_job(name, address, Console()))


def _hear_interrupts() -> None:
    """SIGINT interrupts also what a script has started in the background, for which the shell has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_on_sigterm() -> None:
    """SIGTERM stops the job, as nobody can be asked."""
    from llm_training_toolkit.launch.jobs.submit import Terminated

    def terminate(_number: int, _frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
