"""Runs in TensorBoard: a real one answers; what is not there is said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from llm_training_toolkit.boards import log_directory
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.metrics import TensorBoard


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, one of which has written."""
    board = TensorBoard(tmp_path / "one" / "tb", None)
    board.write(1, {"train/loss": 2.0})
    board.close()
    (tmp_path / "two").mkdir()
    return tmp_path


def test_a_run_or_a_directory_of_runs_is_found(runs: Path) -> None:
    assert log_directory(str(runs / "one")) == str(runs / "one")
    assert log_directory(str(runs)) == str(runs)
    assert log_directory("s3://bucket/runs") == "s3://bucket/runs"


@pytest.mark.parametrize("name", ["two", "three"])
def test_a_run_that_has_written_nothing_is_said_with_those_that_have(runs: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="no run has written anything for TensorBoard there; runs beside it: one"):
        log_directory(str(runs / name))


@pytest.mark.slow
def test_tensorboard_shows_the_run(runs: Path) -> None:
    command = [sys.executable, "-m", "llm_training_toolkit", "tensorboard", str(runs), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if "http://" in line)
        [address] = re.findall(r"http://\S+", said)
        with urllib.request.urlopen(f"{address}data/runs", timeout=30) as answer:
            assert answer.read() == b'["one/tb"]'
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
