"""The ends of a run with a Ray of its own: exit 75 and a checkpoint, and no process stays, whatever was signalled."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.json_lines import read_newest_rows

pytestmark = [pytest.mark.slow]
SECTIONS = {
    "train": {"steps": 100_000, "global_batch_size": 2, "micro_batch_size": 2},
    "checkpoint": {"interval": "10m", "keep_latest": 2},
    "eval": {"interval": 100_000},
    "cluster": {"workers": 1},
}


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def without_ray() -> dict[str, str]:
    """The environment of a command that starts Ray itself."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def test_a_signal_to_the_whole_process_group_saves_and_leaves_no_process(launch_config: Callable[..., Path]) -> None:
    """`timeout`, systemd and a closed terminal reach every process of the group; Ray's must not be among them."""
    config = launch_config("group", **SECTIONS)
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with fork_server.popen(command(config), env=without_ray(), start_new_session=True, **streams) as process:
        wait_for_step(run_of(config), 5, process)
        processes = descendants(process)
        assert any(each.name() == "raylet" for each in processes)
        os.killpg(process.pid, signal.SIGHUP)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    run = run_of(config)
    directory, last = find_latest_checkpoint(run.checkpoints_dir), list(read_newest_rows(run.metrics_path))[-1]
    assert directory is not None
    assert directory.name == f"step_{int(last['step']):09d}_a1"
    assert read_attempt_record(run, 1)["state"] == "stopped"
    assert_gone(processes)


_CONNECTED = """
import os, sys, time
from llm_training_toolkit.launch.backend import prepare_environment
prepare_environment()
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster, get_raylet_address, watch_raylet
from llm_training_toolkit.monitoring.console import Console

def end(why):
    print(why, flush=True)
    os._exit(1)

with connect_to_cluster(Console(sys.stderr)), watch_raylet(get_raylet_address(), end):
    print("connected", flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("victim", ["command", "raylet"])
def test_a_killed_command_leaves_no_process_and_a_killed_raylet_is_named(victim: str) -> None:
    started = [sys.executable, "-c", _CONNECTED]
    with fork_server.popen(started, env=without_ray(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        processes = descendants(process)
        if victim == "command":
            process.kill()
            assert process.wait(timeout=30) == -9
        else:
            next(each for each in processes if each.name() == "raylet").kill()
            assert "raylet" in process.stdout.readline()
            assert process.wait(timeout=30) == 1
    assert_gone(processes)
