"""Sinks of servers: nothing waits for them, nothing is lost while they are down, and it is told once."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_training_toolkit.config.schema import MlflowConfig, WandbConfig
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.monitoring.background_sink import BackgroundSink, TrackerClient
from llm_training_toolkit.monitoring.metrics import Metrics, ScalarValues
from llm_training_toolkit.monitoring.trackers import MlflowClient, TrackedRun, WandbClient
from llm_training_toolkit.runs.directory import RunDirectory


class Server:
    """A tracker, and its client, that takes nothing while it is down, and never a step that it refuses."""

    name = "server"

    def __init__(self, *refused: int) -> None:
        self.up = threading.Event()
        self.refused = refused
        self.rows: list[tuple[int, ScalarValues]] = []
        self.moments: list[float] = []
        self.ended: bool | None = None
        self.abandoned = False

    def open(self) -> Server:
        return self

    def log(self, step: int, values: ScalarValues, moment: float) -> None:
        if not self.up.is_set():
            raise ConnectionError("nobody answers")
        if step in self.refused:
            raise ValueError(f"step {step} is refused")
        self.rows.append((step, values))
        self.moments.append(moment)

    def finish(self, *, failed: bool) -> None:
        self.ended = failed

    def is_temporary(self, error: Exception) -> bool:
        return isinstance(error, OSError)

    def abandon(self) -> None:
        self.abandoned = True


def open_metrics(folder: Path, sink: BackgroundSink) -> tuple[Metrics, list[Any]]:
    events: list[Any] = []
    context = RunContext(0, 1, torch.device("cpu"), event_listener=events.append)
    return Metrics(RunDirectory(folder), 1, 0, context, [sink]), events


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_server_that_was_down_gets_every_row_once_and_in_order(tmp_path: Path) -> None:
    server = Server()
    sink = BackgroundSink(server, close_seconds=300, retry_seconds=0.01)
    metrics, events = open_metrics(tmp_path, sink)
    for step in range(1, 200):
        metrics.write(step, {"train/loss": 1.0 / step})
        if step == 50:
            wait(lambda: bool(sink._failure))
        if step == 100:
            server.up.set()
            wait(lambda: not sink._failure)
    metrics.close()
    assert server.rows == [(step, {"train/loss": 1.0 / step}) for step in range(1, 200)]
    assert server.moments == sorted(server.moments)
    assert server.ended is False
    assert [type(event) for event in events] == [WarningEvent, NoteEvent]
    assert "server cannot be written (ConnectionError: nobody answers); training continues" in events[0].message


def test_a_server_that_comes_back_while_the_run_ends_gets_the_rest(tmp_path: Path) -> None:
    server = Server()
    metrics, _ = open_metrics(tmp_path, sink := BackgroundSink(server, close_seconds=300))
    metrics.write(1, {"train/loss": 1.0})
    wait(lambda: bool(sink._failure))
    threading.Timer(0.1, server.up.set).start()
    metrics.close()
    assert [step for step, _ in server.rows] == [1]
    assert server.ended is False


def test_a_refused_row_is_left_out_and_the_next_ones_arrive(tmp_path: Path) -> None:
    server = Server(2)
    server.up.set()
    metrics, events = open_metrics(tmp_path, sink := BackgroundSink(server, close_seconds=300))
    metrics.write(1, {"train/loss": 1.0})
    metrics.write(2, {"train/loss": 1.0})
    wait(lambda: bool(sink._failure))
    metrics.write(3, {"train/loss": 1.0})
    metrics.close(failed=True)
    assert [step for step, _ in server.rows] == [1, 3]
    assert server.ended is True
    assert "ValueError: step 2 is refused" in events[0].message


def test_a_server_that_stays_down_is_given_up_at_the_end(tmp_path: Path) -> None:
    server = Server()
    metrics, events = open_metrics(tmp_path, sink := BackgroundSink(server, close_seconds=0.1))
    metrics.write(1, {"train/loss": 1.0})
    metrics.close()
    assert [type(event) for event in events] == [WarningEvent]
    assert server.ended is None
    assert server.abandoned
    wait(lambda: not sink._thread.is_alive())


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    run = TrackedRun("run", tmp_path, "id", {})
    clients: dict[str, TrackerClient] = {
        "wandb": WandbClient(WandbConfig(project="p", mode="offline"), run),
        "mlflow": MlflowClient(MlflowConfig(tracking_uri="file:nowhere", experiment="e"), run),
    }
    sink = BackgroundSink(clients[package], close_seconds=300)
    metrics, events = open_metrics(tmp_path, sink)
    wait(lambda: not sink._thread.is_alive())
    for step in range(1, 5):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    [warning] = events
    assert f"{clients[package].name} cannot be written (ModuleNotFoundError: import of {package}" in warning.message
    assert "training continues" in warning.message
