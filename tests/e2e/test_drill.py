"""`ltt drill`: real failures done to a run of one process, and a count of what was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.setup.machine import RAY_HEAD_TIMEOUT_VARIABLE


def sections(steps: int, batch: int, workers: int) -> dict[str, Any]:
    return {
        "train": {"steps": steps, "global_batch_size": batch, "micro_batch_size": 2},
        "checkpoint": {"interval": 10, "keep_latest": 3},
        "cluster": {"workers": workers},
    }


def get_drill_environment() -> dict[str, str]:
    """The environment of a drill, which gives up a lost head soon."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return environment | {RAY_HEAD_TIMEOUT_VARIABLE: "6"}


def drill(
    config: Path, *kinds: str, environment: Mapping[str, str], seed: int = 1, hang: str = "20s"
) -> dict[str, Any]:
    """A drill with one failure of each kind: its report, once nothing was lost."""
    command = [sys.executable, "-m", "llm_training_toolkit", "drill", str(config), "--json", "--seed", str(seed)]
    command += ["--kills", str(len(kinds)), "--faults", ",".join(kinds), "--hang", hang]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    assert sorted(each["kind"] for each in found["failures"]) == sorted(kinds)
    counted = ("sequences_missing", "sequences_doubled", "checkpoints_wrong", "max_loss_difference")
    assert [found[name] for name in counted] == [0, 0, 0, 0.0]
    assert found["weights_equal"] is True
    return found


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_one_process_survives_kills_damage_and_storage_that_takes_no_more(
    launch_config: Callable[..., Path],
) -> None:
    kinds = ("worker", "driver", "stop", "during_checkpoint", "corrupt_checkpoint", "storage")
    found = drill(launch_config("drilled", **sections(200, 4, 0)), *kinds, environment=get_drill_environment())
    for of in ("", "_undisturbed"):
        split: dict[str, float] = found[f"goodput{of}"]
        wall = found[f"wall_seconds{of}"]
        left = 3.0 * (1 + len(kinds))  # Python takes a second to leave, with other work beside it two or three
        assert sum(split.values()) == pytest.approx(wall, rel=0.01, abs=left)
    assert found["goodput"]["idle"] > 0
