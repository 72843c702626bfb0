"""Command line `ltt`, one function for each verb. Heavy imports are inside the verb that needs them."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llm_training_toolkit import __version__
from llm_training_toolkit.cli.evaluate import evaluate
from llm_training_toolkit.cli.generate import generate
from llm_training_toolkit.cli.jobs import jobs, submit
from llm_training_toolkit.cli.tune import tune
from llm_training_toolkit.config.printable import escape_control_characters
from llm_training_toolkit.errors import ToolkitError, format_os_error

if TYPE_CHECKING:
    from llm_training_toolkit.config import Config
    from llm_training_toolkit.launch.request import TrainRequest
    from llm_training_toolkit.monitoring.terminal import TerminalStream

app = typer.Typer(
    name="ltt",
    help="Train and tune Qwen and StarCoder on any Ray cluster, and lose nothing when machines die.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

InitKind = Literal["chat", "code", "text", "scratch", "search"]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Single fields, as key=value: train.steps=100", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


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


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Cluster file (cluster/*.yaml, cluster/slurm.sh): check that it fits, estimate time and cost."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: steps, batch, memory, DeepSpeed JSON, every problem. Takes no hardware."""
    from llm_training_toolkit.commands.plan import plan_run
    from llm_training_toolkit.config import load_config
    from llm_training_toolkit.plan import format_plan

    made, there = plan_run(load_config(config, overrides or ()), cluster)
    if as_json:
        typer.echo(json.dumps(made.to_json() | (there.to_json() if there else {"hours": None, "cost": None})))
    else:
        typer.echo("\n".join(format_plan(made, there)))
    if made.problems:
        raise typer.Exit(2)


@app.command()
def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Reread the documents and compare their content.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read and render a sample of every source.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize and pack the documents into a cache; `train` does it where needed."""
    from llm_training_toolkit.config import load_config

    read = load_config(config, overrides or ())  # reports configuration errors before torch is imported
    if check:
        _check_sample(read, as_json=as_json)
        return
    from llm_training_toolkit.commands.prepare import prepare_dataset
    from llm_training_toolkit.data.prepare.epochs import (
        build_data_facts,
        build_dataset_info_json,
        format_dataset_info,
    )
    from llm_training_toolkit.monitoring.console import Console
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy
    from llm_training_toolkit.plan import format_mixture, make_plan

    with open_terminal_copy(2 if as_json else 1) as screen:
        console = Console(screen)
        try:
            dataset_info = prepare_dataset(read, console, verify=verify)
        finally:
            console.close()
    if as_json:
        typer.echo(json.dumps(build_dataset_info_json(dataset_info)))
    else:
        typer.echo(
            "\n".join(
                [*format_dataset_info(dataset_info), *format_mixture(make_plan(read, build_data_facts(dataset_info)))]
            )
        )


def _check_sample(config: Config, *, as_json: bool) -> None:
    """Print what a sample of every source holds; exit 1 if it has faults."""
    from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
    from llm_training_toolkit.data.prepare.source_check import check_sources

    samples = list(check_sources(config, get_tokenization_spec(config)))
    if as_json:
        typer.echo(json.dumps({"sources": [sample.to_json() for sample in samples]}))
    else:
        typer.echo(escape_control_characters("\n".join(line for sample in samples for line in sample.format_lines())))
    if any(sample.faults for sample in samples):
        raise typer.Exit(1)


@app.command(name="show-batch")
def show_batch(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    step: Annotated[int, typer.Option(min=1, help="Step, as in metrics.jsonl: the first is 1.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show the sequences of a step as text: loss mask in colour, the document of each part."""
    from rich.console import Console as Terminal

    from llm_training_toolkit.commands.show_batch import build_batch_json, print_batch
    from llm_training_toolkit.commands.show_batch import load_batch_sequences as show
    from llm_training_toolkit.config import load_config
    from llm_training_toolkit.monitoring.console import Console

    console = Console(sys.stderr)
    try:
        shown = show(load_config(config, overrides or ()), step, console)
    finally:
        console.close()
    if as_json:
        typer.echo(json.dumps(build_batch_json(step, shown)))
    else:
        print_batch(step, shown, Terminal(highlight=False))


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Accept a changed identity field (data.sources), or changed documents (documents)."),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Accept another length; the learning-rate schedule stretches to it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train. The same command resumes; a finished run is skipped. Ctrl-C saves a checkpoint and stops."""
    from llm_training_toolkit.launch.request import TrainRequest
    from llm_training_toolkit.launch.signals import interrupt_on_stop_signals
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy

    request = TrainRequest(config, overrides or (), accept or (), extend)
    with interrupt_on_stop_signals(), open_terminal_copy(1) as out, open_terminal_copy(2) as err:
        code = _train(request, out, err, as_json=as_json)
    raise typer.Exit(code)


def _train(request: TrainRequest, out: TerminalStream, err: TerminalStream, *, as_json: bool) -> int:
    """Train, print the result or the error, and return the exit code."""
    from llm_training_toolkit.config import load_config
    from llm_training_toolkit.launch.request import (
        EXIT_CODES,
        build_failure_json,
        build_interrupted_json,
        format_next_steps,
    )
    from llm_training_toolkit.monitoring.console import Console

    console, config = Console(err if as_json else out, result_stream=out if as_json else None), None
    try:
        config = load_config(request.config, request.overrides)  # reports configuration errors before torch is imported
        from llm_training_toolkit.commands.train import start_run
        from llm_training_toolkit.worker.spec import is_first_rank

        outcome = start_run(request, console)
    except KeyboardInterrupt:
        console.print_line("interrupted: the same command resumes from the latest checkpoint")
        console.print_result(build_interrupted_json(config))
        return EXIT_CODES["stopped"]
    except (ToolkitError, OSError) as error:
        console.close()
        message = format_os_error(error) if isinstance(error, OSError) else str(error)
        err.write(f"error: {escape_control_characters(message)}\n")
        console.print_result(build_failure_json(error))
        return error.exit_code if isinstance(error, ToolkitError) else ToolkitError.exit_code
    except Exception as error:  # outermost handler: Python prints the traceback, this the summary line
        console.close()
        said = escape_control_characters(f"{type(error).__name__}: {error}")
        err.write(f"error: {said} (the traceback is in the newest file under logs/)\n")
        raise
    finally:
        console.close()
    if not is_first_rank():
        pass  # under torchrun only rank 0 prints
    elif as_json:
        console.print_result(outcome.to_json())
    else:
        for line in format_next_steps(outcome, request):
            console.print_line(line)
    return EXIT_CODES[outcome.status]


@app.command()
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
        from rich.console import Console as Terminal

        from llm_training_toolkit.runs.table import build_runs_table, watch_runs

        if watch:
            with suppress(KeyboardInterrupt):
                watch_runs(list_runs)
        else:
            Terminal(highlight=False).print(build_runs_table(found))


@app.command()
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


@app.command()
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


@app.command()
def drill(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    kills: Annotated[int, typer.Option(min=1, help="Number of faults.")] = 5,
    faults: Annotated[
        str,
        typer.Option(
            help="Faults to inject, separated by commas; with Ray also hang; with a cluster of the drill's own also "
            "node, preemption, head."
        ),
    ] = "worker,driver,stop,during_checkpoint,corrupt_checkpoint,storage",
    seed: Annotated[int, typer.Option(help="Seed of the faults and their times.")] = 0,
    hang: Annotated[str, typer.Option(help="failures.hang_timeout of both runs.")] = "20s",
    as_json: AsJson = False,
) -> None:
    """Inject faults into a run (fault-injection drill) and compare it with an undisturbed one."""
    from llm_training_toolkit.launch.drill.drill import DrillRunner, DrillSpec
    from llm_training_toolkit.launch.drill.report import format_report
    from llm_training_toolkit.launch.request import EXIT_CODES
    from llm_training_toolkit.launch.signals import interrupt_on_stop_signals
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy

    order = DrillSpec(config, overrides or (), kills, [kind.strip() for kind in faults.split(",")], seed, hang)
    with interrupt_on_stop_signals(), open_terminal_copy(1) as out, open_terminal_copy(2) as err:
        try:
            report = DrillRunner(order, lambda text: print(text, file=err)).run_drill()
        except KeyboardInterrupt:
            err.write(
                "stopped: the run that was under way has saved a checkpoint; the same command begins a new drill\n"
            )
            raise typer.Exit(EXIT_CODES["stopped"]) from None
        out.write((json.dumps(report.to_json()) if as_json else "\n".join(format_report(report))) + "\n")
    if not report.is_lossless:
        raise typer.Exit(1)


@app.command()
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


@app.command()
def init(
    kind: Annotated[InitKind, typer.Argument(help="What to train on, or `search`.", show_default=False)],
    model: Annotated[str, typer.Option(help="Hub id, directory or known size.")] = "Qwen/Qwen3-0.6B",
    data: Annotated[
        str | None, typer.Option(help="File or folder of documents.", show_default="the standard library of Python")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="by model and kind")] = None,
    base: Annotated[str, typer.Option(help="Run file of a search.")] = "run.yaml",
) -> None:
    """Print a commented configuration that fits this machine: ltt init chat --data chats.jsonl > run.yaml."""
    from llm_training_toolkit.commands.init import (
        StarterRequest,
        detect_machine,
        format_starter_config,
        format_starter_search,
    )

    if kind == "search":
        typer.echo(format_starter_search(base), nl=False)
        return
    if data is None and kind == "chat":
        raise typer.BadParameter("give your conversations: --data chats.jsonl")
    request = StarterRequest(kind, model, data or "python:stdlib", name)
    typer.echo(format_starter_config(request, detect_machine()), nl=False)


@app.command()
def doctor(
    runs: Annotated[Path, typer.Option("--runs", help="Directory that runs are written to.")] = Path("runs"),
    *,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, devices, limits, disk, cluster and hub; say what to do. Exit code 1 = a failure."""
    from llm_training_toolkit.commands.doctor import check_whole_machine, format_checks

    checks = list(check_whole_machine(runs))
    typer.echo(json.dumps([check.to_json() for check in checks]) if as_json else "\n".join(format_checks(checks)))
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


app.command()(submit)
app.add_typer(jobs, name="jobs")
app.command()(generate)
app.command()(evaluate)
app.command()(tune)


def main() -> None:
    """Run a command; report errors of the toolkit and of the operating system as one line, and exit with their code."""
    from llm_training_toolkit.monitoring.terminal import open_missing_descriptors

    open_missing_descriptors()
    try:
        app()
    except ToolkitError as error:
        typer.echo(f"error: {escape_control_characters(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        typer.echo(f"error: {escape_control_characters(format_os_error(error))}", err=True)
        sys.exit(ToolkitError.exit_code)
