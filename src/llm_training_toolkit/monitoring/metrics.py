"""Metrics: one writer on rank 0, several sinks, stable names.

Always `metrics.jsonl`, with TensorBoard beside it; further sinks are in trackers.py. A file that cannot be opened fails
the run at once. A later failure of a sink is reported once; training continues, and every later write tries again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.runs.atomic_write import sync_directory
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import terminate_last_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

ScalarValues = Mapping[str, float]
_MAX_PENDING_BYTES = 1 << 24  # rows kept for a disk that takes none: some twenty thousand
_REOPEN_SECONDS = 30.0  # each try on a full disk may leave an empty event file


class MetricSink(Protocol):
    """Receiver of the scalars and texts of a step."""

    name: str
    """Name in messages."""

    def write(self, step: int, values: ScalarValues) -> None:
        """Write scalars by metric name."""

    def add_text(self, step: int, name: str, content: str) -> None:
        """Write a text in Markdown."""

    def sync(self) -> None:
        """Make everything written so far survive a power loss."""

    def close(self, *, failed: bool = False) -> None:
        """Write everything. failed: the run ended with an error."""


class JsonLines:
    """Sink `metrics.jsonl`: one object a line with step, attempt and time; a step's last attempt counts.

    Rows that the disk refuses are kept and written with a later one, without gaps or doubles.
    """

    name = "JsonLines"

    def __init__(self, path: Path, attempt: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._attempt = attempt
        terminate_last_line(path)
        self._file = path.open("a+b", buffering=0)
        self._pending = b""
        sync_directory(path.parent)

    def write(self, step: int, values: ScalarValues) -> None:
        """Append a line."""
        row = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **values}
        if len(self._pending) < _MAX_PENDING_BYTES:
            self._pending += json.dumps(row).encode() + b"\n"
        self._write_pending()

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def sync(self) -> None:
        """Write pending rows and sync the file."""
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002 - for sinks that tell others of it
        """Write pending rows and close the file."""
        try:
            self._write_pending()
        finally:
            self._file.close()

    def _write_pending(self) -> None:
        while self._pending:
            end = self._file.seek(0, os.SEEK_END)
            try:
                written = self._file.write(self._pending)
            except OSError:  # perhaps after a part of the bytes: the next write continues behind them
                taken = os.pread(self._file.fileno(), len(self._pending), end)
                self._pending = self._pending.removeprefix(taken)
                raise
            self._pending = self._pending[written:]


class TensorBoard:
    """Sink of event files in a directory; hides points beyond `resumed_step`, unless that is None.

    A writer of events does not recover from a failed write: half a minute later the next one opens a new file.
    """

    name = "TensorBoard"

    def __init__(self, directory: Path, resumed_step: int | None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        _backdate_event_files(directory)
        # Also from step 0: an attempt that died before its first checkpoint has left points.
        self._directory, self._purge_step = directory, resumed_step + 1 if resumed_step else resumed_step
        self._failure: OSError | None = None
        self._reopen_at = 0.0
        self._writer: SummaryWriter | None = self._open_writer()

    def write(self, step: int, values: ScalarValues) -> None:
        """Write one point per name."""
        with self._reopen_after_failure() as writer:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def add_text(self, step: int, name: str, content: str) -> None:
        """Write a text panel."""
        with self._reopen_after_failure() as writer:
            writer.add_text(name, content, step)
            writer.flush()

    def sync(self) -> None:
        """Do nothing: curves are drawn from event files, and `metrics.jsonl` holds the same numbers."""

    def close(self, *, failed: bool = False) -> None:  # noqa: ARG002 - for sinks that tell others of it
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()

    def _open_writer(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import, rank 0 alone needs it

        return SummaryWriter(str(self._directory), purge_step=self._purge_step)

    @contextmanager
    def _reopen_after_failure(self) -> Iterator[SummaryWriter]:
        if self._failure is not None and time.monotonic() < self._reopen_at:
            raise self._failure
        writer, self._writer = self._writer, None
        try:
            writer = writer or self._open_writer()
            yield writer
        except OSError as error:
            self._failure, self._reopen_at, self._purge_step = error, time.monotonic() + _REOPEN_SECONDS, None
            with suppress(OSError):
                if writer is not None:
                    writer.close()
            raise
        self._writer, self._failure = writer, None


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

    def __init__(
        self,
        run: RunDirectory,
        attempt: int,
        resumed_step: int,
        context: RunContext,
        trackers: Sequence[MetricSink] = (),
    ) -> None:
        """Open `metrics.jsonl` and TensorBoard on rank 0; `trackers` are further sinks of that rank."""
        self._context = context
        self._sinks: list[MetricSink] = []
        self._failing: set[MetricSink] = set()
        if context.is_rank_zero:
            files: list[MetricSink] = [
                JsonLines(run.metrics_path, attempt),
                TensorBoard(run.tensorboard_dir, resumed_step),
            ]
            self._sinks = [*files, *trackers]

    def write(self, step: int, values: ScalarValues) -> None:
        """Record the scalars of a step."""
        for sink in self._sinks:
            with self._report_failure(sink):
                sink.write(step, values)
                self._report_recovery(sink)

    def add_text(self, step: int, name: str, content: str) -> None:
        """Record a text."""
        for sink in self._sinks:
            with self._report_failure(sink):
                sink.add_text(step, name, content)

    def sync(self) -> None:
        """Make the metrics so far survive a power loss, as a checkpoint of these steps does."""
        for sink in self._sinks:
            with self._report_failure(sink):
                sink.sync()

    def close(self, *, failed: bool = False) -> None:
        """Close every sink. failed: the run ended with an error."""
        for sink in self._sinks:
            with self._report_failure(sink):
                sink.close(failed=failed)

    @contextmanager
    def _report_failure(self, sink: MetricSink) -> Iterator[None]:
        """Report the first of several failures in a row."""
        try:
            yield
        except OSError as error:
            if sink not in self._failing:
                self._failing.add(sink)
                message = f"{sink.name} cannot be written ({error}); training continues"
                self._context.report(WarningEvent(message))

    def _report_recovery(self, sink: MetricSink) -> None:
        if sink in self._failing:
            self._failing.remove(sink)
            self._context.report(NoteEvent(f"{sink.name} is written again"))
