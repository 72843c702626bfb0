"""`ltt train` without Ray: in one process, and under torchrun with several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch.conftest import command, run_of, wait_for_step

from llm_training_toolkit.runs import RunDirectory

pytestmark = [pytest.mark.slow]
SECTIONS = {"train": {"steps": 40, "global_batch": 4, "micro_batch": 2}, "cluster": {"workers": 0}}


def losses(run: RunDirectory) -> list[float]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_one_process_stops_with_a_checkpoint_and_goes_on(launch_config: Callable[..., Path]) -> None:
    config = launch_config("inline", **SECTIONS)
    arguments = command(config, "train.steps=400", "--json")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run_of(config), 5, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    stopped = json.loads(out)["step"]
    shorter = command(config, f"train.steps={stopped + 5}", "--extend")
    done = subprocess.run(shorter, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(losses(run_of(config))) == stopped + 5


def test_torchrun_ranks_train_the_same_run_as_one_process(launch_config: Callable[..., Path]) -> None:
    alone = launch_config("alone", **SECTIONS | {"train": {"steps": 5, "global_batch": 4, "micro_batch": 2}})
    several = launch_config("several", **SECTIONS | {"train": {"steps": 5, "global_batch": 4, "micro_batch": 2}})
    subprocess.run(command(alone), check=True, capture_output=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    ranks = [*torchrun, "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*ranks, *command(several)], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert losses(run_of(several)) == pytest.approx(losses(run_of(alone)), rel=1e-3)
    assert len(list(run_of(several).logs(1).iterdir())) == 2
