"""Verbs for runs that exist: `runs`, `report`, `tensorboard`, `export`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from llm_training_toolkit.cli.options import AsJson
from llm_training_toolkit.runs.printable import escape_control_characters


def runs(
    directory: Annotated[str, typer.Argument(help="Directory of runs, or its URI (s3://bucket/runs).")] = "runs",
    watch: Annotated[bool, typer.Option("--watch", help="Refresh the table until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the runs of a directory: state, step, time left, newest checkpoint, last error."""
    from llm_training_toolkit.runs.status import read_run_statuses
    from llm_training_toolkit.runs.storage.open import open_runs_directory

    with open_runs_directory(
        directory, lambda text: typer.echo(escape_control_characters(text), err=True)
    ) as list_runs:
        found = read_run_statuses(list_runs())
        if as_json:
            typer.echo(json.dumps([status.to_json() for status in found]))
            return
        if not found and not watch:
            typer.echo(f"no runs in {directory}")
            return
        from llm_training_toolkit.cli.tables import print_tables
        from llm_training_toolkit.runs.table import build_runs_table, watch_runs

        if watch:
            with suppress(KeyboardInterrupt):
                watch_runs(list_runs)
        else:
            print_tables(build_runs_table(found))


def report(
    runs: Annotated[list[str], typer.Argument(help="Run directories, or their URIs.", show_default=False)],
    *,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    cluster: Annotated[
        Path | None, typer.Option(help="Cluster file: set its forecast of time and cost beside what was measured.")
    ] = None,
) -> None:
    """Write one HTML page of one or several runs: plan and measurements, curves, attempts, data, evaluations."""
    from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

    hardware = None if cluster is None else read_hardware(cluster)
    from llm_training_toolkit.commands.report import write_report

    typer.echo(write_report(runs, output, hardware))


def tensorboard(
    run: Annotated[
        str,
        typer.Argument(help="A run, a directory of runs, or its URI (s3://bucket/runs).", show_default=False),
    ],
    *,
    host: Annotated[str, typer.Option(help="Interface to listen on; localhost = this machine only.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free port.")] = 6006,
) -> None:
    """Open a run, or a directory of runs, in TensorBoard until Ctrl-C."""
    from llm_training_toolkit.cli.tensorboard import show_in_tensorboard

    show_in_tensorboard(run, host, port)


def export(
    run: Annotated[str, typer.Argument(help="Run directory, such as runs/NAME, or its URI.", show_default=False)],
    *,
    step: Annotated[
        int | None, typer.Option(min=0, help="Step of the checkpoint.", show_default="the newest complete one")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge LoRA adapters into the base model.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory to write.", show_default="RUN/export")] = None,
    as_json: AsJson = False,
) -> None:
    """Export a checkpoint as a Hugging Face directory, reloaded and compared by its logits."""
    from llm_training_toolkit.export.export_run import export_run
    from llm_training_toolkit.runs.directory import check_run
    from llm_training_toolkit.runs.storage.open import open_path

    with open_path(run) as opened:
        done = export_run(
            check_run(opened), step=step, merge=merge, out=out, say=lambda text: typer.echo(text, err=True)
        )
    typer.echo(json.dumps(done.to_json()) if as_json else str(done))
