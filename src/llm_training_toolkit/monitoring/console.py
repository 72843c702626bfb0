"""What a person sees while a run works: stages with bars, then one line with step, loss, speed, time left.

Fed with events (plain mappings) from this process or from the workers. Writes to the terminal it was
given, so that output of libraries can be sent to log files meanwhile.
"""

from __future__ import annotations

import time
from collections import deque
from typing import IO, Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from llm_training_toolkit.distributed.context import Event
from llm_training_toolkit.runs.table import format_duration

_LINE_EVERY = 10.0
"""Seconds between step lines where there is no terminal to draw on (a log file, a pipe)."""


_FORECAST_AFTER = 10
"""Steps after which the length of the run is said: the first one of an attempt is not among them."""


class RemainingTimeEstimator:
    """Seconds to the end of a run, from the steps of this attempt: its newest 50, and all that came between steps.

    The first step is left out, as it loads and compiles. Times are the worker's own, because events arrive in groups.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._began = 0.0
        self._recent: deque[float] = deque(maxlen=50)
        self._within = self._between = 0.0

    def add_step(self, completed_at: float, seconds: float) -> None:
        """Count a step that took so many seconds and was completed at a time in seconds."""
        if self._began == 0.0:
            self._began = completed_at
            return
        self.steps += 1
        self._recent.append(seconds)
        self._within += seconds
        self._between = max(0.0, (completed_at - self._began - self._within) / self.steps)

    def estimate_seconds(self, steps_left: int) -> float | None:
        """Seconds that so many steps will take; None before the second step."""
        if not self.steps:
            return None
        return steps_left * (sum(self._recent) / len(self._recent) + self._between)


class Console:
    """The screen of one command."""

    def __init__(self, file: IO[str] | None = None) -> None:
        self.terminal = Terminal(file=file, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._remaining = RemainingTimeEstimator()
        self._last_line = 0.0

    def print_line(self, text: str = "", style: str = "") -> None:
        """A line that stays."""
        self.terminal.print(text, style=style or None, markup=False)

    def show_event(self, event: Event) -> None:
        """Show an event of a kind this screen knows; others are for the logs."""
        shower = getattr(self, f"_show_{event['kind']}", None)
        if shower is not None:
            shower(event)

    def update_stage(self, name: str, done: int, total: int) -> None:
        """Progress of a stage of the preparation."""
        self.show_event({"kind": "stage", "name": name, "done": done, "total": total})

    def close(self) -> None:
        """Leave the terminal as it was found."""
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
        if event["rank"] == 0:  # other workers: the time they took to start says nothing of the speed
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
    """A sample with what the model wrote set apart from what it was given."""
    from rich.text import Text  # noqa: PLC0415 - only where a sample is shown

    return [
        Text(event["before"], style="dim"),
        Text(event["written"], style="green"),
        Text(event["after"], style="dim"),
    ]


def format_step_line(event: Event, seconds_left: float | None) -> str:
    """One line for a step: step, loss, learning rate, speed, time left."""
    left = "" if seconds_left is None else f"  {format_duration(seconds_left)} left"
    width = len(str(event["steps"]))
    return (
        f"step {event['step']:>{width}}/{event['steps']}  loss {event['loss']:.4f}  lr {event['lr']:.2e}"
        f"  {event['tokens_per_second']:,.0f} tokens/s{left}"
    )
