"""Verb `tune`: hyperparameter search. Heavy imports are inside the function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_training_toolkit.cli.options import AsJson
from llm_training_toolkit.errors import ToolkitError, format_os_error

if TYPE_CHECKING:
    from llm_training_toolkit.launch.tune.tuner import SearchSpec

SearchFile = Annotated[Path, typer.Argument(help="YAML file of the search.", show_default=False)]


def tune(
    search: SearchFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Single fields of the search file, as key=value: trials=16", show_default=False),
    ] = None,
    *,
    as_json: AsJson = False,
) -> None:
    """Search hyperparameters with Ray Tune. The same command resumes; finished trials stay."""
    from llm_training_toolkit.launch.request import EXIT_CODES, build_failure_json
    from llm_training_toolkit.launch.signals import interrupt_on_stop_signals
    from llm_training_toolkit.monitoring.console import Console
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy

    with interrupt_on_stop_signals(), open_terminal_copy(1) as out, open_terminal_copy(2) as err:
        console, spec = Console(err if as_json else out, result_stream=out if as_json else None), None
        try:
            from llm_training_toolkit.launch.tune.tuner import read_search, run_search  # seconds: may be interrupted

            spec = read_search(search, overrides or [])
            status, found = run_search(spec, console)
        except KeyboardInterrupt:
            console.print_line("interrupted: the same command resumes")
            console.print_result(_build_interrupted_json(spec))
            raise typer.Exit(EXIT_CODES["stopped"]) from None
        except (ToolkitError, OSError) as error:
            console.close()
            err.write(f"error: {format_os_error(error) if isinstance(error, OSError) else error}\n")
            console.print_result(build_failure_json(error))
            raise typer.Exit(getattr(error, "exit_code", ToolkitError.exit_code)) from None
        finally:
            console.close()
        if as_json:
            console.print_result(found)
        elif status == "stopped":
            console.print_line("stopped: the same command resumes the trials that had begun")
        elif found["best"] is not None:
            console.print_line(f"best: {found['best']['trial']}, {found['best']['value']}: {found['search']}/best.yaml")
            console.print_line(f"{found['tokens']:,} tokens in all; the report: {found['search']}/report.html")
        failed = status == "finished" and found["best"] is None
    if failed:
        raise typer.Exit(1)
    raise typer.Exit(EXIT_CODES[status])


def _build_interrupted_json(spec: SearchSpec | None) -> dict[str, Any]:
    """Return the summary of the work so far; its search is absent until it has been read."""
    if spec is None:
        return {"search": None, "best": None, "trials": [], "tokens": 0}
    from llm_training_toolkit.search.event_log import EventLog
    from llm_training_toolkit.search.results import build_summary

    return build_summary(spec.search, EventLog(spec.directory.event_log_path), spec.directory)
