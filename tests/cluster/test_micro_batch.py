"""`train.micro_batch_size: auto` on Ray: the next attempt takes less after an out-of-memory."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import fork_server
from e2e.test_micro_batch import GIVES_BACK, SECTIONS, TRAIN, attempts
from launching import Environment, command, run_of
from llm_training_toolkit.runs.attempts import (
    read_attempt_record,
)
from llm_training_toolkit.runs.directory import RunDirectory

LIMIT_ON_RAY = 2400
"""Megabytes beside what a Ray worker holds when its attempt begins: too few for 32 sequences, enough for 16."""


def test_on_ray_the_next_attempt_takes_less_and_no_restart_is_spent(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    sections = SECTIONS | {"train": TRAIN | {"global_batch_size": 64}, "failures": {"max_failures": 0}}
    sections["cluster"] = {"workers": 2, "env": GIVES_BACK}
    config = launch_config("narrow-ray", **sections)
    run = run_of(config)
    with fork_server.popen(command(config), env=ray_environment, stdout=subprocess.PIPE) as process:
        _limit_the_first_attempt(run)
        out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    assert "out of memory with micro-batches of 32; the next attempt takes 16" in out
    assert [(each["micro_batch"], each["state"]) for each in attempts(run)] == [(32, "failed"), (16, "finished")]


def _limit_the_first_attempt(run: RunDirectory) -> None:
    """Set the limit on rank 0 alone, as soon as it has said who it is; later workers have none."""
    end = time.monotonic() + 400
    while not (found := read_attempt_record(run, 1)):
        assert time.monotonic() < end
        time.sleep(0.02)
    pid = int(found["pid"])
    size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (size + LIMIT_ON_RAY * 2**20, resource.RLIM_INFINITY))
