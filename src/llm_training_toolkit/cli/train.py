"""Verbs that train: `train`, and `drill`, which injects faults meanwhile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from llm_training_toolkit.cli.options import AsJson, ConfigFile, Overrides
from llm_training_toolkit.errors import ToolkitError, format_os_error
from llm_training_toolkit.runs.printable import escape_control_characters

if TYPE_CHECKING:
    from llm_training_toolkit.launch.request import TrainRequest
    from llm_training_toolkit.monitoring.terminal import TerminalStream


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
        for line in format_next_steps(outcome, request, config):
            console.print_line(line)
    return EXIT_CODES[outcome.status]


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
