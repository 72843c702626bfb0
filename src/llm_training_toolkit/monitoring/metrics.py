"""Metrics: one writer on rank 0, several sinks, stable names.

Always `metrics.jsonl`, with TensorBoard beside it. A sink that cannot start fails the run at once. A later failure of a
sink is reported once, and training continues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.runs.directory import RunDirectory

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ScalarValues = Mapping[str, float]


class MetricSink(Protocol):
    """Receiver of the scalars and texts of a step."""

    def write(self, step: int, values: ScalarValues) -> None:
        """Write scalars by metric name."""

    def add_text(self, step: int, name: str, content: str) -> None:
        """Write a text in Markdown."""

    def close(self) -> None:
        """Write everything to disk."""


class JsonLines:
    """Sink `metrics.jsonl`: one object a line with step, attempt and time; a step's last attempt counts."""

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        _terminate_last_line(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, values: ScalarValues) -> None:
        """Append a line."""
        row = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row) + "\n")

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _terminate_last_line(path: Path) -> None:
    """End the partial line of a killed writer, so that the next one is not appended to it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")


class TensorBoard:
    """Sink of event files in a directory; hides points beyond `resumed_step`, unless that is None."""

    def __init__(self, directory: Path, resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import, rank 0 alone needs it

        directory.mkdir(parents=True, exist_ok=True)
        _backdate_event_files(directory)
        # Also from step 0: an attempt that died before its first checkpoint has left points.
        purge = resumed_step + 1 if resumed_step else resumed_step
        self._writer: SummaryWriter = SummaryWriter(str(directory), purge_step=purge)

    def write(self, step: int, values: ScalarValues) -> None:
        """Write one point per name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def add_text(self, step: int, name: str, content: str) -> None:
        """Write a text panel."""
        self._writer.add_text(name, content, step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def _backdate_event_files(directory: Path) -> None:
    """Rename event files from a clock ahead of this one: TensorBoard orders files by the second in their name.

    Otherwise it would read new points before the ones they continue.
    """
    now = int(time.time())
    ahead = [path for path in sorted(directory.glob("events.out.tfevents.*")) if int(path.name.split(".")[3]) >= now]
    for age, path in enumerate(reversed(ahead), start=1):
        words = path.name.split(".")
        path.rename(path.with_name(".".join([*words[:3], f"{now - age:010d}", *words[4:]])))


class Metrics:
    """Writer to all sinks on rank 0; does nothing on other ranks."""

    def __init__(self, run: RunDirectory, attempt: int, resumed_step: int, context: RunContext) -> None:
        self._context = context
        self._sinks: list[MetricSink] = []
        if context.is_rank_zero:
            self._sinks = [JsonLines(run.metrics_path, attempt), TensorBoard(run.tensorboard_dir, resumed_step)]

    def write(self, step: int, values: ScalarValues) -> None:
        """Record the scalars of a step."""
        for sink in list(self._sinks):
            try:
                sink.write(step, values)
            except OSError as error:
                self._disable_sink(sink, error)

    def add_text(self, step: int, name: str, content: str) -> None:
        """Record a text."""
        for sink in list(self._sinks):
            try:
                sink.add_text(step, name, content)
            except OSError as error:
                self._disable_sink(sink, error)

    def _disable_sink(self, sink: MetricSink, error: OSError) -> None:
        self._sinks.remove(sink)
        with suppress(OSError):
            sink.close()
        message = f"{type(sink).__name__} cannot be written any more ({error}); training goes on without it"
        self._context.report(WarningEvent(message))

    def close(self) -> None:
        """Close every sink."""
        for sink in list(self._sinks):
            try:
                sink.close()
            except OSError as error:
                self._disable_sink(sink, error)
