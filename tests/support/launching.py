"""The command line as a person runs it, and the run that it leads to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from llm_training_toolkit.runs.directory import RunDirectory

Environment = Mapping[str, str]


def run_of(config: Path) -> RunDirectory:
    """The run directory that a file of the fixture `launch_config` leads to."""
    return RunDirectory(config.parent / config.stem)


def command(config: Path, *arguments: str) -> list[str]:
    """`ltt train` with this environment's Python."""
    return [sys.executable, "-m", "llm_training_toolkit", "train", str(config), *arguments]


def wait_for_step(run: RunDirectory, step: int, process: subprocess.Popen[str], seconds: float = 900) -> None:
    """Wait until the run has completed `step` steps."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if run.metrics_path.exists() and any(
            json.loads(line)["step"] >= step for line in run.metrics_path.read_text().splitlines() if line.endswith("}")
        ):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise TimeoutError(f"{run.path} has not reached step {step} within {seconds} s")
