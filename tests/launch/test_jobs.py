"""A run as a Ray job on a head with token authentication: submitted both ways, stopped, resumed, finished."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.conftest import run_of, wait_for_step
from llm_training_toolkit.runs import RunDirectory

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(400)]
BIN = Path(sys.executable).parent
STEPS = 600
SECTIONS = {"train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2}}


@dataclass(frozen=True)
class Head:
    """A running head node."""

    address: str
    environment: Mapping[str, str]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with token authentication, on ports and in a folder of its own; ended by its process."""
    folder = Path(tempfile.gettempdir()) / f"ltt-head-{os.getpid()}"  # a socket's path must be short
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    dashboard = _free_port()
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "4", "--temp-dir", str(folder)]
    command += ["--port", _free_port(), "--dashboard-port", dashboard, "--ray-client-server-port", _free_port()]
    command += ["--dashboard-agent-listen-port", _free_port(), "--disable-usage-stats"]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            address = f"http://127.0.0.1:{dashboard}"
            _wait_for_jobs(address, environment, process, log)
            yield Head(address, environment)
        finally:
            process.terminate()
            process.wait(timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


def _wait_for_jobs(address: str, environment: Mapping[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the head takes jobs."""
    ask = [str(BIN / "ray"), "job", "list", "--address", address]
    end = time.monotonic() + 90
    while subprocess.run(ask, env=environment, capture_output=True, check=False).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(1)


def submit(config: Path, head: Head, *arguments: str) -> list[str]:
    """`ltt submit` from the folder of the configuration."""
    return [str(BIN / "ltt"), "submit", config.name, "--address", head.address, *arguments]


def steps_of(run: RunDirectory) -> list[int]:
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [row["step"] for row in rows if "train/loss" in row]


def test_a_job_is_followed_stopped_with_a_checkpoint_and_resumed(
    launch_config: Callable[..., Path], head: Head
) -> None:
    config = launch_config("job", **SECTIONS)
    run = run_of(config)
    with subprocess.Popen(
        submit(config, head),
        env=head.environment,
        cwd=config.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_step(run, 5, process)
        second = subprocess.run(
            submit(config, head), env=head.environment, cwd=config.parent, capture_output=True, text=True, check=False
        )
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert second.returncode == 1
    assert "run job is going on there as job" in second.stderr
    assert process.returncode == 75, err
    assert "with a checkpoint" in out
    stopped = steps_of(run)[-1]
    assert 5 <= stopped < STEPS
    assert run.checkpoint(stopped, 1).is_dir()

    plain = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(config.parent)]
    done = subprocess.run(
        [*plain, "--", "ltt", "train", config.name], env=head.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from step_{stopped:09d}_a1" in done.stdout
    assert steps_of(run) == list(range(1, STEPS + 1))


def test_a_finished_run_is_left_alone_by_a_job_too(launch_config: Callable[..., Path], head: Head) -> None:
    config = launch_config("job", **SECTIONS)
    done = subprocess.run(
        submit(config, head), env=head.environment, cwd=config.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RAY_AUTH_TOKEN": "0" * 64}, "cannot be reached"),
        ({"RAY_AUTH_MODE": "disabled"}, "cannot be reached"),
    ],
)
def test_a_wrong_token_is_said(
    launch_config: Callable[..., Path], head: Head, change: dict[str, str], words: str
) -> None:
    config = launch_config("job", **SECTIONS)
    environment = {**head.environment, **change}
    done = subprocess.run(
        submit(config, head), env=environment, cwd=config.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_address_and_a_lost_run_directory_are_refused(launch_config: Callable[..., Path], head: Head) -> None:
    config = launch_config("job", **SECTIONS)
    nowhere = Head(f"http://127.0.0.1:{_free_port()}", head.environment)
    for command, code, words in (
        (submit(config, nowhere), 1, "cannot be reached"),
        (submit(config, head, "run.dir=runs"), 2, "give a path that every node sees"),
        (submit(config, head, "cluster.workers=0"), 2, "cluster.workers = 0"),
    ):
        done = subprocess.run(
            command, env=head.environment, cwd=config.parent, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert words in done.stderr
