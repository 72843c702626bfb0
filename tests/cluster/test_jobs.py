"""A run as a Ray job on a head with token authentication: submitted both ways, stopped, resumed, finished."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import pytest

import fork_server
from broken_connection import Connection
from joining import wait_for_nodes
from launching import command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.data.sample_log import FetchedSequence
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.drill.data_audit import read_attempt_spans, read_fetched_sequences
from llm_training_toolkit.launch.jobs import logs as log
from llm_training_toolkit.launch.jobs.logs import JobHandle
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from machine_limits import find_free_port

BIN = Path(sys.executable).parent
STEPS = 1200
"""More than are done before the run has been stopped twice."""
SECTIONS = {
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
    # The length, which is settled when the run has stopped twice, changes nothing.
    "optim": {"lr_scheduler": "constant", "lr": 3e-4},
    "cluster": {"workers": [2, 3], "env": {"SAID_IN_THE_CONFIGURATION": "yes"}},
    "failures": {"log_samples": True},
}
NODES = ("127.0.1.1", "127.0.1.2", "127.0.1.3")


@dataclass(frozen=True)
class Head:
    """A running head node without CPUs, and three nodes with one each and addresses of their own."""

    address: str
    """Of its dashboard."""
    environment: Mapping[str, str]
    nodes: list[subprocess.Popen[bytes]]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`ray start --head` with token authentication, on ports and in a folder of its own; ended by its process."""
    folder = Path(tempfile.gettempdir()) / f"ltt-head-{os.getpid()}"  # a socket's path must be short
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",  # Ray's 30 s for what still runs; nothing does
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    dashboard, port = str(find_free_port()), str(find_free_port())
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "0", "--temp-dir", str(folder)]
    command += ["--port", port, "--dashboard-port", dashboard, "--ray-client-server-port", str(find_free_port())]
    command += ["--dashboard-agent-listen-port", str(find_free_port()), "--disable-usage-stats"]
    written = tmp_path_factory.mktemp("head") / "log"
    with ExitStack() as running, written.open("w") as out:
        address = f"http://127.0.0.1:{dashboard}"
        process = _start(command, environment, out, running)
        _wait_for_jobs(Head(address, environment, []), process, written)
        joining = [str(BIN / "ray"), "start", "--address", f"127.0.0.1:{port}", "--block", "--num-cpus", "1"]
        nodes = []
        for node in NODES:  # one after another: Ray's start of several on one machine at once fails now and then
            own = ["--node-ip-address", node, "--dashboard-agent-listen-port", str(find_free_port())]
            own += ["--temp-dir", f"{folder}-{node}"]  # as on machines of their own: nodes delete what they unpacked
            nodes.append(_start([*joining, *own], environment, out, running))
            wait_for_nodes(f"127.0.0.1:{port}", environment, node)
        yield Head(address, environment, nodes)
        for each in [process, *nodes]:  # together: each of them takes seconds to end
            each.terminate()
    for left in [folder, *(Path(f"{folder}-{node}") for node in NODES)]:
        shutil.rmtree(left, ignore_errors=True)


def _start(
    command: list[str], environment: Mapping[str, str], out: IO[str], running: ExitStack
) -> subprocess.Popen[bytes]:
    """A process that is ended with the others."""
    process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def end() -> None:
        process.terminate()
        process.wait(timeout=300)

    running.callback(end)
    return process


def ask(head: Head, path: str) -> Any:
    """What the dashboard answers."""
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(f"{head.address}{path}", headers=token), timeout=30) as answer:
        return json.load(answer)


def _wait_for_jobs(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the head takes jobs."""
    end = time.monotonic() + 400
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        with suppress(OSError):  # nobody listens yet, or no agent that would answer
            ask(head, "/api/jobs/")
            return
        time.sleep(0.2)


def submit(config: Path, head: Head, *arguments: str) -> list[str]:
    """`ltt submit` from the folder of the configuration."""
    return [str(BIN / "ltt"), "submit", config.name, "--address", head.address, *arguments]


def jobs(head: Head, *arguments: str) -> list[str]:
    """`ltt jobs`."""
    return [str(BIN / "ltt"), "jobs", *arguments, "--address", head.address]


def run_command(command: list[str], config: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return fork_server.run(command, env=environment, cwd=config.parent, capture_output=True)


@contextmanager
def running_process(
    command: list[str], config: Path, head: Head, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with fork_server.popen(command, env=head.environment, cwd=config.parent, **pipes) as process:
        yield process


def rows_of(run: RunDirectory) -> list[dict[str, Any]]:
    """What was recorded of the steps."""
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


def test_a_run_on_three_nodes_is_followed_left_alone_stopped_resumed_on_two_and_finished(
    launch_config: Callable[..., Path], head: Head, tmp_path: Path
) -> None:
    config = launch_config("job", **SECTIONS)
    stopped = follow_and_stop(config, head)
    head.nodes.pop().terminate()
    resume_leave_alone_and_stop(config, head, stopped)
    steps = int(rows_of(run_of(config))[-1]["step"]) + 20
    shutil.copy(config, tmp_path)  # alone: Ray packs the whole folder, with every run in it, and takes 100 MB at most
    plain = [str(BIN / "ray"), "job", "submit", "--address", head.address, "--working-dir", str(tmp_path)]
    done = run_command(
        [*plain, "--", "ltt", "train", config.name, f"train.steps={steps}", "--extend"], config, head.environment
    )
    assert done.returncode == 0, done.stdout + done.stderr

    alone = launch_config("job-alone", **SECTIONS | {"cluster": {"workers": 0}})
    assert run_command(command(alone, f"train.steps={steps}"), alone, os.environ).returncode == 0
    found, wanted = rows_of(run_of(config)), rows_of(run_of(alone))
    assert [row["step"] for row in found] == list(range(1, steps + 1))
    assert [row["train/tokens"] for row in found] == [row["train/tokens"] for row in wanted]
    apart = [abs(mine["train/loss"] / other["train/loss"] - 1) for mine, other in zip(found, wanted, strict=True)]
    assert max(apart) < 1e-5
    assert Counter(fetched(run_of(config))) == Counter(fetched(run_of(alone)))


def fetched(run: RunDirectory) -> list[FetchedSequence]:
    """The sequences that went into the newest weights."""
    newest_one = find_latest_checkpoint(run.checkpoints_dir)
    assert newest_one is not None
    return read_fetched_sequences(run, read_attempt_spans(run, newest_one.name))


def follow_and_stop(config: Path, head: Head) -> int:
    """Submit the run, over a connection that breaks for a while, and stop it by Ctrl-C; the step it has stopped at."""
    run = run_of(config)
    connection = Connection(int(head.address.rsplit(":", maxsplit=1)[-1]))
    through = replace(head, address=f"http://127.0.0.1:{connection.port}")
    with running_process(submit(config, through), config, head) as process:
        wait_for_step(run, 5, process)
        of_workers = [Path(f"/proc/{pid}/environ").read_text() for pid in read_attempt_record(run, 1)["processes"]]
        second = run_command(submit(config, head), config, head.environment)
        connection.cut()
        time.sleep(3)
        connection.mend()
        wait_for_step(run, rows_of(run)[-1]["step"] + 5, process)
        time.sleep(3)  # until it has read on
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=900)
    assert len(of_workers) == 3
    assert all("SAID_IN_THE_CONFIGURATION=yes" in environment for environment in of_workers)
    assert sorted(placement["node"] for placement in read_attempt_record(run, 1)["ranks"]) == sorted(NODES)
    assert all(f" on node {node} (cpu)" in out for node in NODES)
    assert second.returncode == 1
    assert "run job is running there as job" in second.stderr
    assert process.returncode == 75, out + err
    assert " of this folder" in out
    assert out.count("is lost; trying again") == 1
    assert out.count("starting with 3 workers of 2 to 3") == 1, "what was shown before is not shown again"
    stopped = int(rows_of(run)[-1]["step"])
    assert stopped >= 5
    assert run.get_checkpoint_dir(stopped, 1).is_dir()
    return stopped


def resume_leave_alone_and_stop(config: Path, head: Head, stopped: int) -> None:
    """Resume from where it stopped, leave it alone at a keyboard, stop it from elsewhere."""
    run = run_of(config)
    ours, theirs = os.openpty()
    with running_process(jobs(head, "resume", "job"), config, head, stdin=theirs) as process:
        wait_for_step(run, stopped + 5, process)
        time.sleep(3)  # until the log is here
        process.send_signal(signal.SIGINT)
        os.write(ours, b"d\n")
        out, err = process.communicate(timeout=900)
    os.close(ours)
    os.close(theirs)
    assert process.returncode == 0, err
    assert f"resuming from step_{stopped:09d}_a1" in out
    assert "the run continues; `ltt jobs logs job` follows it again" in out
    [first, now] = json.loads(run_command([*jobs(head), "--json"], config, head.environment).stdout)
    assert (first["run"], first["status"], now["run"], now["status"]) == ("job", "stopped", "job", "running")
    left = run_command(jobs(head, "stop", "job"), config, head.environment)
    assert left.returncode == 0, left.stderr
    assert "stopped; `ltt jobs resume job` resumes it" in left.stdout
    assert read_attempt_record(run, 2)["workers"] == 2
    shown = run_command(jobs(head, "logs", "job"), config, head.environment)
    assert shown.returncode == 75
    assert f"resuming from step_{stopped:09d}_a1" in shown.stdout


def test_the_train_view_of_the_dashboard_has_the_run(head: Head) -> None:
    runs = ask(head, "/api/train/v2/runs/v1")["train_runs"]
    assert max(len(attempt["workers"]) for run in runs for attempt in run["attempts"]) == 3


def test_a_cluster_that_dies_and_one_that_has_forgotten_the_job_are_said(
    head: Head, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.job_submission import JobSubmissionClient

    connection = Connection(int(head.address.rsplit(":", maxsplit=1)[-1]))
    address = f"http://127.0.0.1:{connection.port}"
    token = {"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"}
    client = JobSubmissionClient(address, headers=token)
    with pytest.raises(LaunchError, match="knows no job gone any more: its head has started anew"):
        JobHandle(client, "gone", address, Console()).follow_logs()
    monkeypatch.setattr(log, "_RECONNECT_TIMEOUT_SECONDS", 3.0)
    connection.cut()
    with pytest.raises(LaunchError, match="If the cluster lives, the job continues: `ltt jobs logs gone"):
        JobHandle(client, "gone", address, Console()).follow_logs()
    assert "is lost; trying again" in capsys.readouterr().out


def test_a_run_that_is_not_there_is_said(launch_config: Callable[..., Path], head: Head) -> None:
    config = launch_config("job", **SECTIONS)
    done = run_command(jobs(head, "logs", "jobs"), config, head.environment)
    assert done.returncode == 1
    assert "no job there is the run jobs; did you mean job?" in done.stderr


def test_a_finished_run_is_left_alone_by_a_job_too(launch_config: Callable[..., Path], head: Head) -> None:
    config = launch_config("job", **SECTIONS)
    length = f"train.steps={rows_of(run_of(config))[-1]['step']}"
    done = run_command(submit(config, head, length), config, head.environment)
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
    # A start of its own: a fork server for each of these environments would cost three times as much.
    done = subprocess.run(
        submit(config, head), env=environment, cwd=config.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_address_and_a_lost_run_directory_are_refused(launch_config: Callable[..., Path], head: Head) -> None:
    config = launch_config("job", **SECTIONS)
    nowhere = replace(head, address=f"http://127.0.0.1:{find_free_port()}")
    for wrong, code, words in (
        (submit(config, nowhere), 1, "cannot be reached"),
        (submit(config, head, "run.dir=runs"), 2, "give a path that every node sees"),
        (submit(config, head, "cluster.workers=0"), 2, "cluster.workers = 0"),
    ):
        done = run_command(wrong, config, head.environment)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
