"""Metrics: every line belongs to a step and an attempt, and no disk trouble stops training."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fork_server
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory
from machine_limits import no_file_beyond


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def events() -> list[Any]:
    return []


@pytest.fixture
def context(events: list[Any]) -> RunContext:
    return RunContext(0, 1, torch.device("cpu"), event_listener=events.append)


@contextmanager
def metrics(run: RunDirectory, context: RunContext, attempt: int = 1, resumed: int = 0) -> Iterator[Metrics]:
    opened = Metrics(run, attempt, resumed, context)
    try:
        yield opened
    finally:
        opened.close()


def lines(run: RunDirectory) -> list[dict[str, Any]]:
    """The rows, their times checked and taken out."""
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    times = [row.pop("time") for row in rows]
    assert times == sorted(times)
    assert all(abs(moment - time.time()) < 60 for moment in times)
    return rows


def curves(run: RunDirectory) -> Any:
    found = EventAccumulator(str(run.tensorboard_dir))
    found.Reload()
    return found


def points(run: RunDirectory, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in curves(run).Scalars(name)]


def test_each_line_carries_step_and_attempt(run: RunDirectory, context: RunContext) -> None:
    with metrics(run, context) as first:
        first.write(1, {"train/loss": 5.5, "optim/lr": 1e-3})
        first.write(1, {"perf/checkpoint_seconds": 0.25})
    with metrics(run, context, attempt=2, resumed=1) as second:
        second.write(2, {"train/loss": 5.25})
    assert lines(run) == [
        {"step": 1, "attempt": 1, "train/loss": 5.5, "optim/lr": 1e-3},
        {"step": 1, "attempt": 1, "perf/checkpoint_seconds": 0.25},
        {"step": 2, "attempt": 2, "train/loss": 5.25},
    ]


def test_a_line_is_on_disk_before_the_next_is_written(run: RunDirectory, context: RunContext) -> None:
    with metrics(run, context) as opened:
        for step in (1, 2, 3):
            opened.write(step, {"train/loss": 1.0})
            assert [line["step"] for line in lines(run)] == list(range(1, step + 1))


def test_half_a_line_of_a_killed_writer_does_not_swallow_the_next(run: RunDirectory, context: RunContext) -> None:
    with metrics(run, context) as first:
        first.write(1, {"train/loss": 5.5})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "attem')
    with metrics(run, context, attempt=2, resumed=1) as second:
        second.write(2, {"train/loss": 5.25})
    whole, half, after = run.metrics_path.read_text().splitlines()
    assert json.loads(whole)["step"] == 1
    assert half == '{"step": 2, "attem'
    row = json.loads(after)
    assert (row["step"], row["attempt"], row["train/loss"]) == (2, 2, 5.25)


def test_a_whole_last_line_gets_no_empty_line_after_it(run: RunDirectory, context: RunContext) -> None:
    for attempt in (1, 2, 3):
        with metrics(run, context, attempt):
            pass
        with metrics(run, context, attempt) as opened:
            opened.write(attempt, {})
    assert [line["attempt"] for line in lines(run)] == [1, 2, 3]


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory
metrics = Metrics(RunDirectory(Path(sys.argv[1])), 1, 0, RunContext(0, 1, torch.device("cpu")))
for step in range(1, 6):
    metrics.write(step, {"train/loss": float(step)})
metrics.add_text(5, "note", "last words")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_has_lost_nothing_and_a_resume_hides_what_it_repeats(
    run: RunDirectory, context: RunContext
) -> None:
    killed = fork_server.run([sys.executable, "-c", _KILLED, str(run.path)])
    assert killed.returncode == -9
    assert points(run, "train/loss") == [(step, float(step)) for step in range(1, 6)]
    assert curves(run).Tags()["tensors"] == ["note/text_summary"]
    time.sleep(1.1)  # event files are ordered by the second in their names
    with metrics(run, context, attempt=2, resumed=3) as second:
        second.write(4, {"train/loss": 40.0})
    assert points(run, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(line["step"], line["attempt"]) for line in lines(run)] == [(s, 1) for s in range(1, 6)] + [(4, 2)]


def test_tensorboard_shows_numbers_and_texts(run: RunDirectory, context: RunContext) -> None:
    with metrics(run, context) as opened:
        opened.write(1, {"train/loss": 2.5, "optim/lr": 0.125})
        opened.write(2, {"train/loss": 1.5})
        opened.add_text(2, "samples/completion 1", "**größer** `def`")
        assert points(run, "train/loss") == [(1, 2.5), (2, 1.5)]
    assert points(run, "optim/lr") == [(1, 0.125)]
    [text] = curves(run).Tensors("samples/completion 1/text_summary")
    assert text.step == 2
    assert text.tensor_proto.string_val[0].decode() == "**größer** `def`"
    assert len(lines(run)) == 2


def test_a_sink_that_cannot_start_fails_at_once(run: RunDirectory, context: RunContext) -> None:
    run.metrics_path.mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"):
        Metrics(run, 1, 0, context)


def test_a_full_disk_is_reported_once_and_the_other_sink_continues(
    run: RunDirectory, context: RunContext, events: list[Any]
) -> None:
    run.path.mkdir(parents=True)
    run.metrics_path.symlink_to("/dev/full")
    with metrics(run, context) as opened:
        for step in (1, 2, 3):
            opened.write(step, {"train/loss": float(step)})
    [event] = events
    assert isinstance(event, WarningEvent)
    assert "JsonLines cannot be written" in event.message
    assert "No space left on device" in event.message
    assert "training continues" in event.message
    assert points(run, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.fixture
def threads_before() -> set[threading.Thread]:
    return set(threading.enumerate())


@contextmanager
def full_disk(size: int, threads_before: set[threading.Thread]) -> Iterator[None]:
    """No file grows beyond a size, until TensorBoard's threads have met it: in this test, not in a later one."""
    try:
        with no_file_beyond(size):
            yield
    finally:
        for thread in set(threading.enumerate()) - threads_before:
            if type(thread).__name__ == "_AsyncWriterThread":
                thread.join(timeout=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_no_sink_can_be_written_each_is_reported_once_and_training_continues(
    run: RunDirectory, context: RunContext, events: list[Any], threads_before: set[threading.Thread]
) -> None:
    with full_disk(2_000, threads_before), metrics(run, context) as opened:
        for step in range(1, 201):
            opened.write(step, {"train/loss": float(step)})
        opened.add_text(200, "note", "x" * 5_000)
    assert sorted(event.message.split()[0] for event in events) == ["JsonLines", "TensorBoard"]
    assert all("File too large" in event.message for event in events)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_when_metrics_are_closed_does_not_fail_a_finished_run(
    run: RunDirectory, context: RunContext, events: list[Any], threads_before: set[threading.Thread]
) -> None:
    opened = Metrics(run, 1, 0, context)
    opened.write(1, {"train/loss": 1.0})
    [sink] = [sink for sink in opened._sinks if type(sink).__name__ == "TensorBoard"]
    writer = sink._writer  # type: ignore[attr-defined]
    size = os.path.getsize(next(run.tensorboard_dir.iterdir()))  # noqa: PTH202
    with full_disk(size, threads_before):
        for step in range(2, 20):
            writer.add_scalar("train/loss", 1.0, step)  # queued: nobody has noticed yet
            time.sleep(0.001)
            if writer.file_writer.event_writer._async_writer._worker.exception is not None:
                break
        opened.close()
    assert [event.message.split()[0] for event in events] == ["TensorBoard"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_rows_that_a_full_disk_refused_are_written_when_it_has_room_again(
    run: RunDirectory, context: RunContext, events: list[Any], threads_before: set[threading.Thread]
) -> None:
    """One failed write, half of it done, used to end the curve of the whole attempt."""
    with metrics(run, context) as opened:
        opened.write(1, {"train/loss": 1.0})
        with full_disk(run.metrics_path.stat().st_size + 10, threads_before):
            opened.write(2, {"train/loss": 2.0})
            opened.write(3, {"train/loss": 3.0})
        opened.write(4, {"train/loss": 4.0})
    assert [(row["step"], row["train/loss"]) for row in lines(run)] == [(step, float(step)) for step in range(1, 5)]
    mine = [type(event) for event in events if event.message.startswith("JsonLines")]
    assert mine == [WarningEvent, NoteEvent]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_continues_after_a_failed_write(
    run: RunDirectory, context: RunContext, threads_before: set[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_training_toolkit.monitoring.metrics._REOPEN_SECONDS", 0.0)
    with metrics(run, context) as opened:
        opened.write(1, {"train/loss": 1.0})
        [events_file] = run.tensorboard_dir.iterdir()
        with full_disk(events_file.stat().st_size, threads_before):
            for step in range(2, 100):
                opened.write(step, {"train/loss": float(step)})
        time.sleep(1.1)  # event files are ordered by the second in their names
        opened.write(100, {"train/loss": 100.0})
        opened.write(101, {"train/loss": 101.0})
    assert {(1, 1.0), (101, 101.0)} <= set(points(run, "train/loss"))


def test_metrics_are_synced_on_request(run: RunDirectory, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    plain = os.fsync

    def record_sync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.append((found.st_ino, found.st_size))
        plain(descriptor)

    with metrics(run, context) as opened:
        monkeypatch.setattr(os, "fsync", record_sync)
        opened.write(1, {"train/loss": 1.0})
        assert not synced
        opened.sync()
        there = run.metrics_path.stat()
    assert synced == [(there.st_ino, there.st_size)]


def test_nothing_is_written_on_other_ranks(run: RunDirectory, events: list[Any]) -> None:
    context = RunContext(1, 2, torch.device("cpu"), event_listener=events.append)
    with metrics(run, context) as opened:
        opened.write(1, {"train/loss": 1.0})
        opened.add_text(1, "note", "text")
    assert not run.path.exists()
    assert events == []
