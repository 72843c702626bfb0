"""Terminal output of a run: stages with bars, then one line with step, loss, speed and time left.

Receives events from this process or from workers. Writes to the given terminal, so that output of
libraries can go to log files.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from llm_training_toolkit.distributed.events import (
    CheckpointEvent,
    EvalEvent,
    Event,
    NoteEvent,
    SampleEvent,
    StageEvent,
    StepEvent,
    StragglerEvent,
    WarningEvent,
    WorkerStartedEvent,
)
from llm_training_toolkit.monitoring.logs import DRIVER_LOGGER
from llm_training_toolkit.monitoring.terminal import TerminalStream
from llm_training_toolkit.runs.printable import escape_control_characters
from llm_training_toolkit.runs.table import format_device_speed, format_duration

_RESULT_PIECE = 64 * 1024  # characters
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
    """Terminal output of one command. A `TerminalStream` as its file keeps a stalled terminal from delaying or ending
    the command.
    """

    def __init__(
        self,
        file: IO[str] | TerminalStream | None = None,
        listener: Callable[[Event], None] | None = None,
        result_stream: TerminalStream | None = None,
    ) -> None:
        """Open the terminal, or write to `file`; `listener` receives each event before it is shown.

        result_stream: standard output of a command with `--json`.
        """
        self._listener, self._result_stream = listener, result_stream
        # The kernel of a notebook would show bars as HTML, and its commands, which write to a pipe, bars in place of
        # step lines: it sets FORCE_COLOR, which rich takes for a terminal.
        is_terminal = None if file is None else file.isatty()
        self.terminal = Terminal(
            file=cast("IO[str] | None", file),
            highlight=False,
            soft_wrap=True,
            force_jupyter=False,
            force_terminal=is_terminal,
        )
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._remaining = RemainingTimeEstimator()
        self._last_line = 0.0

    def print_line(self, text: str = "", style: str = "") -> None:
        """Print a line that stays on the screen, and log it."""
        self.terminal.print(escape_control_characters(text), style=style or None, markup=False)
        if text:
            DRIVER_LOGGER.info("%s", text)

    def print_warning(self, message: str) -> None:
        """Print a warning, and log it as one."""
        self.terminal.print(f"warning: {escape_control_characters(message)}", style="yellow", markup=False)
        DRIVER_LOGGER.warning("%s", message)

    def print_result(self, result: Mapping[str, Any]) -> None:
        """Print the result of a command with `--json`; nothing without."""
        if self._result_stream is None:
            return
        text = json.dumps(result) + "\n"
        for start in range(0, len(text), _RESULT_PIECE):  # the stream drops more than it can hold
            self._result_stream.write(text[start : start + _RESULT_PIECE])
            self._result_stream.drain()

    def show_event(self, event: Event) -> None:
        """Pass an event to the listener and show it."""
        if self._listener is not None:
            self._listener(event)
        self._print_event(event)

    def _print_event(self, event: Event) -> None:
        """Print an event. Errors and rungs of a search have no line: the driver reports what follows from them."""
        match event:
            case NoteEvent():
                self.print_line(event.message)
            case WarningEvent():
                self.print_warning(event.message)
            case StageEvent():
                self._show_stage(event)
            case StepEvent():
                self._show_step(event)
            case EvalEvent():
                bits = f", {event.bits_per_byte:.3f} bits per byte"
                self.print_line(f"step {event.step}: held-out loss {event.loss:.4f}{bits}", style="cyan")
            case CheckpointEvent():
                self.print_line(f"step {event.step}: checkpoint {event.path}", style="dim")
            case StragglerEvent():
                self._show_straggler(event)
            case SampleEvent():
                self._show_sample(event)
            case WorkerStartedEvent() if event.rank == 0:  # a new worker group: its startup time is no step's
                self._remaining = RemainingTimeEstimator()

    def update_stage(self, name: str, done: int, total: int) -> None:
        """Show the progress of a preparation stage."""
        self.show_event(StageEvent(name, done, total))

    def close(self) -> None:
        """Stop the bars and restore the terminal."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}
        for stream in (self.terminal.file, self._result_stream):
            if isinstance(stream, TerminalStream):
                stream.drain()  # the process may exit without further clean-up

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

    def _show_stage(self, event: StageEvent) -> None:
        fresh = event.name not in self._tasks
        counted = f"{event.done:,}" + (f"/{event.total:,}" if event.total else "") if event.total != 1 else ""
        self._update_progress_bar(event.name, event.done, event.total, counted)
        if fresh and not self.terminal.is_terminal:
            self.print_line(event.name)

    def _show_step(self, event: StepEvent) -> None:
        self._remaining.add_step(event.time, event.seconds)
        left = self._remaining.estimate_seconds(event.steps - event.step)
        if self._remaining.steps == _FORECAST_AFTER and left is not None and left > _LINE_EVERY:
            self.print_line(f"about {format_duration(left)} left on this machine, by its first {_FORECAST_AFTER} steps")
        note = format_step_line(event, left)
        is_line_due = event.step == event.steps or time.monotonic() - self._last_line > _LINE_EVERY
        if is_line_due:
            self._last_line = time.monotonic()
        if self.terminal.is_terminal:
            self._update_progress_bar("training", event.step, event.steps, note)
            if is_line_due:
                DRIVER_LOGGER.info("%s", note)
        elif is_line_due:
            self.print_line(note)

    def _show_straggler(self, event: StragglerEvent) -> None:
        where = f" on node {event.address}" if event.address else ""
        self.print_warning(
            f"rank {event.rank}{where} takes {event.ratio:.1f} times as long for its own work as the other ranks, "
            "which wait for it in every step"
        )

    def _show_sample(self, event: SampleEvent) -> None:
        self.print_line()
        self.print_line(f"{event.title}:", style="bold")
        self.terminal.print(*format_sample(event), sep="", markup=False)


def format_sample(event: SampleEvent) -> list[Text]:
    """Format a sample, with generated text in another colour than the prompt."""
    segments = ((event.prefix, "dim"), (event.written, "green"), (event.suffix, "dim"))
    return [Text(escape_control_characters(text), style=style) for text, style in segments]


def format_step_line(event: StepEvent, seconds_left: float | None) -> str:
    """Format a step as one line: step, loss, learning rate, speed, MFU where the peak is known, time left."""
    left = "" if seconds_left is None else f"  {format_duration(seconds_left)} left"
    width = len(str(event.steps))
    return (
        f"step {event.step:>{width}}/{event.steps}  loss {event.loss:.4f}  lr {event.lr:.2e}"
        f"  {event.tokens_per_second:,.0f} tokens/s  {format_device_speed(event.tflops, event.mfu)}{left}"
    )
