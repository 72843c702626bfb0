"""Table of `ltt runs`. Imports no torch, to start fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.printable import escape_control_characters
from llm_training_toolkit.runs.status import RunStatus, read_run_statuses

_COLOURS = {
    "starting": "cyan",
    "running": "green",
    "finished": "bold green",
    "stopped": "yellow",
    "failed": "red",
    "lost": "red",
    "unreadable": "red",
}


def build_runs_table(found: Iterable[RunStatus]) -> Table:
    """Build the table of runs."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "state", "step", "left", "loss", "speed", "goodput", "newest checkpoint", "last error"):
        table.add_column(title, overflow="fold")
    for run in found:
        table.add_row(
            escape_cell(run.name),
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            f"{run.step:,}" + (f"/{run.steps:,}" if run.steps is not None else ""),
            "" if run.seconds_left is None else format_duration(run.seconds_left),
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.tflops is None else format_device_speed(run.tflops, run.mfu),
            f"{run.goodput['step'] / sum(run.goodput.values()):.0%}" if sum(run.goodput.values()) else "",
            escape_cell(run.checkpoint or ""),
            escape_cell(run.error or ""),
        )
    return table


def escape_cell(text: str) -> str:
    """Return a text from a run's files in one line, without a meaning for the terminal or for rich."""
    return escape(escape_control_characters(" ".join(text.splitlines())))


def watch_runs(list_runs: Callable[[], Iterable[RunDirectory]], seconds: float = 2.0) -> None:
    """Show the table of runs until Ctrl-C; `list_runs` is called for each update."""
    with Live(build_runs_table(read_run_statuses(list_runs())), auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(build_runs_table(read_run_statuses(list_runs())), refresh=True)


def format_device_speed(tflops: float, mfu: float | None) -> str:
    """Format the speed of a device, with its share of the published peak where one is known."""
    return f"{tflops:.3g} TFLOP/s" + ("" if mfu is None else f" ({mfu:.1%} MFU)")


def format_duration(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
