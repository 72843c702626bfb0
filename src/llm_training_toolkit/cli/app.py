"""Command line `ltt`: its verbs in the order of `ltt --help`. Heavy imports are inside the verb that needs them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_training_toolkit import __version__
from llm_training_toolkit.cli.evaluate import evaluate
from llm_training_toolkit.cli.generate import generate
from llm_training_toolkit.cli.jobs import jobs, submit
from llm_training_toolkit.cli.machine import doctor, init
from llm_training_toolkit.cli.plan import plan, prepare, show_batch
from llm_training_toolkit.cli.publish import publish
from llm_training_toolkit.cli.runs import export, report, runs, tensorboard
from llm_training_toolkit.cli.serve import serve
from llm_training_toolkit.cli.train import drill, train
from llm_training_toolkit.cli.tune import tune
from llm_training_toolkit.errors import LaunchError, ToolkitError, format_os_error
from llm_training_toolkit.runs.printable import escape_control_characters

app = typer.Typer(
    name="ltt",
    help="Train and tune Qwen and StarCoder on any Ray cluster, and lose nothing when machines die.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ltt {__version__}")
        raise typer.Exit


@app.callback()
def _accept_global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb."""


app.command()(plan)
app.command()(prepare)
app.command(name="show-batch")(show_batch)
app.command()(train)
app.command()(runs)
app.command()(report)
app.command()(tensorboard)
app.command()(drill)
app.command()(export)
app.command()(init)
app.command()(doctor)
app.command()(submit)
app.add_typer(jobs, name="jobs")
app.command()(generate)
app.command()(serve)
app.command()(evaluate)
app.command()(tune)
app.command()(publish)


def main() -> None:
    """Run a command; report errors of the toolkit and of the operating system as one line, and exit with their code."""
    from llm_training_toolkit.monitoring.terminal import open_missing_streams

    open_missing_streams()
    try:
        _check_current_directory()
        app()
    except ToolkitError as error:
        typer.echo(f"error: {escape_control_characters(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        typer.echo(f"error: {escape_control_characters(format_os_error(error))}", err=True)
        sys.exit(ToolkitError.exit_code)


def _check_current_directory() -> None:
    """Refuse a deleted one, in which the first use of torch aborts the process ("Intel oneMKL FATAL ERROR")."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise LaunchError(
            "the current directory has been deleted: change to one that exists (cd), then give the same command again"
        ) from None
