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
from llm_training_toolkit.monitoring.background_sink import BackgroundSink
from llm_training_toolkit.monitoring.metrics import Metrics, MetricSink, ScalarValues
from llm_training_toolkit.monitoring.trackers import Mlflow, Wandb
from llm_training_toolkit.runs.directory import RunDirectory


class Server:
    """A sink that takes nothing while it is down."""

    name = "server"

    def __init__(self) -> None:
        self.up = threading.Event()
        self.rows: list[tuple[int, ScalarValues]] = []
        self.closed = False

    def write(self, step: int, values: ScalarValues) -> None:
        if not self.up.is_set():
            raise ConnectionError("nobody answers")
        self.rows.append((step, values))

    def add_text(self, step: int, name: str, content: str) -> None:
        raise AssertionError(f"no text was written: {step}, {name}, {content}")

    def sync(self) -> None:
        raise AssertionError("a server is not asked to sync")

    def close(self) -> None:
        self.closed = True


def run_steps(run: RunDirectory, sink: BackgroundSink, server: Server) -> list[Any]:
    """Write steps while the server is down, then up; the events."""
    events: list[Any] = []
    metrics = Metrics(run, 1, 0, RunContext(0, 1, torch.device("cpu"), event_listener=events.append), [sink])
    for step in range(1, 200):
        metrics.write(step, {"train/loss": 1.0 / step})
        if step == 50:
            wait(lambda: bool(sink._failure))
        if step == 100:
            server.up.set()
            wait(lambda: not sink._failure)
    metrics.close()
    return events


def wait(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_server_that_was_down_gets_every_row_once_and_in_order(tmp_path: Path) -> None:
    server = Server()
    sink = BackgroundSink("server", lambda: server, retry_seconds=0.01)
    events = run_steps(RunDirectory(tmp_path), sink, server)
    assert server.rows == [(step, {"train/loss": 1.0 / step}) for step in range(1, 200)]
    assert server.closed
    assert [type(event) for event in events] == [WarningEvent, NoteEvent]
    assert "server cannot be written (ConnectionError: nobody answers); training goes on" in events[0].message


def test_a_server_that_stays_down_ends_with_the_run(tmp_path: Path) -> None:
    server = Server()
    events: list[Any] = []
    sink = BackgroundSink("server", lambda: server)
    context = RunContext(0, 1, torch.device("cpu"), event_listener=events.append)
    metrics = Metrics(RunDirectory(tmp_path), 1, 0, context, [sink])
    metrics.write(1, {"train/loss": 1.0})
    began = time.monotonic()
    metrics.close()
    assert time.monotonic() - began < 20
    assert [type(event) for event in events] == [WarningEvent]


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_package_that_is_missing_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    run = RunDirectory(tmp_path)
    made: dict[str, Callable[[], MetricSink]] = {
        "wandb": lambda: Wandb(WandbConfig(project="p", mode="offline"), run, "id", {}),
        "mlflow": lambda: Mlflow(MlflowConfig(tracking_uri="file:nowhere", experiment="e"), run, "id", {}),
    }
    sink = BackgroundSink(package, made[package])
    events: list[Any] = []
    metrics = Metrics(run, 1, 0, RunContext(0, 1, torch.device("cpu"), event_listener=events.append), [sink])
    wait(lambda: bool(sink._failure))
    for step in range(1, 5):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    [warning] = events
    assert f"{package} cannot be written" in warning.message
    assert "training goes on" in warning.message
