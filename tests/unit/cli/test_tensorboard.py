"""Runs in TensorBoard: a real one answers; what is not there is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import pytest

from llm_training_toolkit.cli.tensorboard import find_log_directory
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.monitoring.metrics import TensorBoard
from llm_training_toolkit.runs.storage.open import open_worker
from s3_server import keys, s3_server


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, one of which has written."""
    board = TensorBoard(tmp_path / "one" / "tb", None)
    board.write(1, {"train/loss": 2.0})
    board.close()
    (tmp_path / "two").mkdir()
    return tmp_path


def test_a_run_or_a_directory_of_runs_is_found(runs: Path) -> None:
    assert find_log_directory(str(runs / "one")) == str(runs / "one")
    assert find_log_directory(str(runs)) == str(runs)
    assert find_log_directory("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_run_that_has_written_nothing_is_said_with_those_that_have(runs: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no run has written anything for TensorBoard there; runs beside it: one"):
        find_log_directory(str(runs / name))


def shown(where: str, environment: Mapping[str, str], seconds: float) -> bytes:
    """The runs that TensorBoard shows, once it has had some seconds to look."""
    command = [sys.executable, "-m", "llm_training_toolkit", "tensorboard", where, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(environment)) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "http://localhost" in line)
        [address] = re.findall(r"http://\S+", said)
        end = time.monotonic() + seconds
        while True:
            with urllib.request.urlopen(f"{address}data/runs", timeout=30) as answer:
                found = bytes(answer.read())
            if found != b"[]" or time.monotonic() > end:
                break
            time.sleep(0.5)
        process.terminate()  # not Ctrl-C: who runs in the background may be told to ignore it
        process.communicate(timeout=120)
    return found


@pytest.mark.slow
def test_tensorboard_shows_the_run(runs: Path) -> None:
    assert shown(str(runs), os.environ, seconds=20) == b'["one/tb"]'


@pytest.mark.slow
def test_tensorboard_shows_a_run_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with open_worker("s3://bucket/runs/one", print) as run:
            board = TensorBoard(run.tensorboard_dir, None)
            for step in (1, 2):
                board.write(step, {"train/loss": 2.0})
                run.storage.flush()
            board.close()
        assert len(keys("runs/one/tb/")) == 2, "segments, each an event file"
        assert shown("s3://bucket/runs", os.environ, seconds=30) == b'["one/tb"]'
