"""Terminal output of a run: stages with bars, then one line with step, loss, speed and time left.

Receives events (plain mappings) from this process or from workers. Writes to the given terminal, so that output of
libraries can go to log files.
"""

from __future__ import annotations

import time
from collections import deque
from typing import IO, Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llm_training_toolkit.distributed.context import Event
from llm_training_toolkit.runs.table import format_duration

_LINE_EVERY = 10.0  # seconds between step lines without a terminal (a log file, a pipe)
_FORECAST_AFTER = 10  # steps before the length of the run is forecast, without an attempt's first one


class RemainingTimeEstimator:
    """Estimator of the time left, from this attempt's newest 50 steps and all the time between steps.

    Skips the first step, which loads and compiles. Uses the worker's times, because events arrive in groups.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._began = 0.0
        self._recent: deque[float] = deque(maxlen=50)
        self._within = self._between = 0.0

    def add_step(self, completed_at: float, seconds: float) -> None:
        """Count a step that took `seconds` and was completed at `completed_at` (in seconds)."""
        if self._began == 0.0:
            self._began = completed_at
            return
        self.steps += 1
        self._recent.append(seconds)
        self._within += seconds
        self._between = max(0.0, (completed_at - self._began - self._within) / self.steps)

    def estimate_seconds(self, steps_left: int) -> float | None:
        """Return the estimated seconds for `steps_left` steps, or None before the second step."""
        if not self.steps:
            return None
        return steps_left * (sum(self._recent) / len(self._recent) + self._between)


class Console:
    """Terminal output of one command."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self.terminal = Terminal(file=file, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._remaining = RemainingTimeEstimator()
        self._last_line = 0.0

    def print_line(self, text: str = "", style: str = "") -> None:
        """Print a line that stays on the screen."""
        self.terminal.print(text, style=style or None, markup=False)

    def show_event(self, event: Event) -> None:
        """Show an event of a known kind; ignore others, which are for the logs."""
        shower = getattr(self, f"_show_{event['kind']}", None)
        if shower is not None:
            shower(event)

    def update_stage(self, name: str, done: int, total: int) -> None:
        """Show the progress of a preparation stage."""
        self.show_event({"kind": "stage", "name": name, "done": done, "total": total})

    def close(self) -> None:
        """Stop the bars and restore the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}

    def _get_progress_bars(self) -> Progress:
        if self._progress is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._progress = Progress(*columns, console=self.terminal, disable=not self.terminal.is_terminal)
            self._progress.start()
        return self._progress

    def _update_progress_bar(self, name: str, done: int, total: int, note: str) -> None:
        bars = self._get_progress_bars()
        if name not in self._tasks:
            self._tasks[name] = bars.add_task(name, total=total or None, note=note)
        bars.update(self._tasks[name], completed=done, total=total or None, note=note)

    def _show_stage(self, event: Event) -> None:
        name, done, total = str(event["name"]), int(event["done"]), int(event["total"])
        fresh = name not in self._tasks
        counted = f"{done:,}" + (f"/{total:,}" if total else "") if total != 1 else ""
        self._update_progress_bar(name, done, total, counted)
        if fresh and not self.terminal.is_terminal:
            self.print_line(name)

    def _show_step(self, event: Event) -> None:
        step, steps = int(event["step"]), int(event["steps"])
        self._remaining.add_step(float(event["time"]), float(event["seconds"]))
        left = self._remaining.estimate_seconds(steps - step)
        if self._remaining.steps == _FORECAST_AFTER and left is not None and left > _LINE_EVERY:
            self.print_line(f"about {format_duration(left)} left on this machine, by its first {_FORECAST_AFTER} steps")
        note = format_step_line(event, left)
        if self.terminal.is_terminal:
            self._update_progress_bar("training", step, steps, note)
        elif step == steps or time.monotonic() - self._last_line > _LINE_EVERY:
            self.print_line(note)
            self._last_line = time.monotonic()

    def _show_introduction(self, event: Event) -> None:
        if event["rank"] == 0:  # new workers: exclude their startup time from the speed
            self._remaining = RemainingTimeEstimator()

    def _show_eval(self, event: Event) -> None:
        bits = f", {event['bits_per_byte']:.3f} bits per byte"
        self.print_line(f"step {event['step']}: held-out loss {event['loss']:.4f}{bits}", style="cyan")

    def _show_checkpoint(self, event: Event) -> None:
        self.print_line(f"step {event['step']}: checkpoint {event['path']}", style="dim")

    def _show_note(self, event: Event) -> None:
        self.print_line(str(event["message"]))

    def _show_warning(self, event: Event) -> None:
        self.print_line(f"warning: {event['message']}", style="yellow")

    def _show_slow(self, event: Event) -> None:
        where = f" on node {event['address']}" if "address" in event else ""
        self.print_line(
            f"warning: rank {event['rank']}{where} takes {event['ratio']:.1f} times as long for its own work as the "
            "other ranks, which wait for it in every step",
            style="yellow",
        )

    def _show_sample(self, event: Event) -> None:
        self.print_line()
        self.print_line(f"{event['title']}:", style="bold")
        self.terminal.print(*format_sample(event), sep="", markup=False)


def format_sample(event: Event) -> list[Any]:
    """Format a sample, with generated text in another colour than the prompt."""
    from rich.text import Text  # noqa: PLC0415 - only where a sample is shown

    return [
        Text(event["before"], style="dim"),
        Text(event["written"], style="green"),
        Text(event["after"], style="dim"),
    ]


def format_step_line(event: Event, seconds_left: float | None) -> str:
    """Format a step as one line: step, loss, learning rate, speed, time left."""
    left = "" if seconds_left is None else f"  {format_duration(seconds_left)} left"
    width = len(str(event["steps"]))
    return (
        f"step {event['step']:>{width}}/{event['steps']}  loss {event['loss']:.4f}  lr {event['lr']:.2e}"
        f"  {event['tokens_per_second']:,.0f} tokens/s{left}"
    )
