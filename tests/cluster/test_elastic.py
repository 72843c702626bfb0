"""A run whose nodes come and go, whose workers die or hang: what happens, what is said, what comes out."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

import fork_server
from launching import Environment, command, run_of, wait_for_step
from llm_training_toolkit.distributed.flight_recorder import get_flight_record_path
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from run_results import read_training_rows

EVERY = 25
SECTIONS = {
    # More steps than are done until the run has grown again, and is stopped.
    "train": {"steps": 600, "global_batch_size": 12, "micro_batch_size": 2, "precision": "fp32"},
    # The length, which is settled when the run is stopped, changes nothing.
    "optim": {"lr_scheduler": "constant", "lr": 3e-4},
    "checkpoint": {"interval": EVERY, "keep_latest": 2},
}
# Ray declares a node dead after five failed checks. Here they fail at once, and Ray's 3 s between them only take time.
HEALTH_CHECKS = {"health_check_period_ms": 1000}


class Nodes:
    """A Ray cluster whose head has no CPU, with worker nodes of `cpus` each by their address."""

    def __init__(self, scripts: Mapping[str, str], *addresses: str, cpus: int = 1) -> None:
        from ray.cluster_utils import Cluster

        self._scripts = scripts
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH_CHECKS, **scripts}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes: dict[str, Any] = {}
        for address in addresses:
            self.add(address, cpus)

    def add(self, address: str, cpus: int = 1) -> None:
        self._nodes[address] = self.cluster.add_node(num_cpus=cpus, node_ip_address=address, **self._scripts)

    def lose(self, address: str) -> None:
        """Kill the node's Ray process, and with it its workers."""
        self.cluster.remove_node(self._nodes.pop(address), allow_graceful=False)

    def announce_end(self, address: str, seconds: int) -> None:
        """What a cloud's notice of preemption leads to: Ray drains the node."""
        from llm_training_toolkit.launch.ray.private_api import drain_node

        drain_node(self.cluster.address, self._nodes[address].node_id, int((time.time() + seconds) * 1e3))


@pytest.fixture
def nodes(worker_scripts: Mapping[str, str]) -> Iterator[Nodes]:
    several = Nodes(worker_scripts, "127.0.1.1", "127.0.1.2", "127.0.1.3")
    yield several
    several.cluster.shutdown()


def attempts(run: RunDirectory) -> list[dict[str, Any]]:
    return [read_attempt_record(run, number) for number in range(1, find_last_attempt(run) + 1)]


def until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)


def works(run: RunDirectory, attempt: int, process: subprocess.Popen[str], steps: int = 5) -> int:
    """Wait until an attempt has done some steps; the step it is at."""

    def done() -> list[int]:
        lines = run.metrics_path.read_text().splitlines() if run.metrics_path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in found if row["attempt"] == attempt and "train/loss" in row]

    until(lambda: len(done()) >= steps, process)
    return done()[-1]


def test_a_run_shrinks_and_grows_with_its_cluster_and_comes_out_the_same(
    nodes: Nodes, launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("elastic", **SECTIONS, cluster={"workers": [1, 3]})
    run, environment = run_of(config), {**ray_environment, "RAY_ADDRESS": nodes.cluster.address}
    with fork_server.popen(command(config), env=environment, stdout=subprocess.PIPE) as process:
        wait_for_step(run, EVERY + 5, process)
        nodes.lose("127.0.1.2")
        lost = time.monotonic()
        works(run, 2, process)
        recovered = time.monotonic() - lost
        nodes.announce_end("127.0.1.3", seconds=60)
        until(lambda: find_last_attempt(run) == 3, process)
        nodes.lose("127.0.1.3")
        nodes.add("127.0.1.4", cpus=2)  # one node: on a busy machine the run grows before a second one has joined
        works(run, 4, process)
        process.terminate()
        out, _ = process.communicate(timeout=900)
    assert process.returncode == 75, out
    first, shrunk, left, grown = attempts(run)
    assert [each["workers"] for each in (first, shrunk, left, grown)] == [3, 2, 1, 3]
    assert [each["state"] for each in (first, shrunk, left, grown)] == ["failed", "drained", "drained", "stopped"]
    assert first["failure"]["kind"] == "node_lost"
    assert "node 127.0.1.2 with rank" in out
    assert recovered < 60
    assert "node 127.0.1.3 will be preempted in" in out
    assert f"resuming from {run.get_checkpoint_dir(shrunk['step'], 2).name}" in out
    assert "more than 1 workers fit now: draining after the next checkpoint" in out
    assert left["step"] % EVERY == 0

    assert_undisturbed(run, launch_config("undisturbed-elastic", **SECTIONS, cluster={"workers": 0}), ray_environment)
    assert run.get_checkpoint_dir(grown["step"], 4).is_dir()


def assert_undisturbed(run: RunDirectory, alone: Path, environment: Environment) -> None:
    """The run's steps are those of one process that nothing disturbs: no sequence lost or doubled."""
    found = list(read_training_rows(run).values())
    done = fork_server.run(command(alone, f"train.steps={len(found)}"), env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    wanted = list(read_training_rows(run_of(alone)).values())
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["train/tokens"] for row in found] == [row["train/tokens"] for row in wanted]
    apart = [abs(mine["train/loss"] / other["train/loss"] - 1) for mine, other in zip(found, wanted, strict=True)]
    assert max(apart) < 1e-5


def test_a_node_lost_and_back_leaves_whole_tensor_parallel_replicas(
    worker_scripts: Mapping[str, str], launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    sections = SECTIONS | {"checkpoint": {"interval": 10, "keep_latest": 2}}
    config = launch_config("cut", **sections, cluster={"workers": [2, 6]}, engine={"tensor_parallel": 2})
    run = run_of(config)
    nodes = Nodes(worker_scripts, "127.0.1.1", "127.0.1.2", cpus=2)
    nodes.add("127.0.1.3", cpus=1)  # a fifth worker that makes no replica
    environment = {**ray_environment, "RAY_ADDRESS": nodes.cluster.address}
    try:
        with fork_server.popen(command(config), env=environment, stdout=subprocess.PIPE) as process:
            wait_for_step(run, 15, process)
            nodes.lose("127.0.1.2")
            works(run, 2, process)
            nodes.add("127.0.1.4", cpus=2)
            works(run, 3, process)
            process.terminate()
            out, _ = process.communicate(timeout=900)
    finally:
        nodes.cluster.shutdown()
    assert process.returncode == 75, out
    assert [(each["workers"], each["state"]) for each in attempts(run)] == [
        (4, "failed"),
        (2, "drained"),
        (4, "stopped"),
    ]
    assert_undisturbed(run, launch_config("alone", **sections, cluster={"workers": 0}), ray_environment)


def test_a_rank_that_hangs_is_named_and_a_step_that_fails_twice_ends_the_run(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    sections = {"train": {"steps": 40, "global_batch_size": 400, "micro_batch_size": 2}}
    config = launch_config("hung", **sections, failures={"hang_timeout": "5s"})
    run = run_of(config)
    with fork_server.popen(
        command(config), env=ray_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        works(run, 1, process, steps=1)
        stopped = other_rank(run, 1)
        stopped.send_signal(signal.SIGSTOP)
        until(lambda: "failure" in read_attempt_record(run, 1), process)
        at = read_attempt_record(run, 1)["failure"]["step"] - 1
        works(run, 2, process, steps=1)
        rank_zero = read_attempt_record(run, 2)["pid"]
        assert works(run, 2, process, steps=at) == at, "no checkpoint: it began at the first step again"
        os.kill(rank_zero, signal.SIGKILL)
        assert not stopped.is_running(), "a stopped process would keep its GPU's memory"
        out, err = process.communicate(timeout=900)
    assert process.returncode == 1
    hung, killed = (each["failure"] for each in attempts(run))
    assert (hung["kind"], hung["rank"], hung["step"]) == ("hang", 1, at + 1)
    assert f"rank 1 (process {stopped.pid}" in out
    assert get_flight_record_path(run.get_log_dir(1), 0).exists()
    assert "its process had been stopped (SIGSTOP); it stands in " in out
    assert re.search(r"the others wait in \w+ \(distributed_c10d\.py:\d+\), called by \w+ \(\w+\.py:\d+\)", out)
    assert (killed["kind"], killed["step"]) == ("killed", at + 1)
    assert f"step {at + 1} failed twice in a row" in err
    assert "Traceback" not in out + err


def other_rank(run: RunDirectory, attempt: int) -> psutil.Process:
    """The process of rank 1, a sibling of rank 0 under the node's Ray process."""
    first = psutil.Process(read_attempt_record(run, attempt)["pid"])
    log = run.get_log_dir(attempt) / "rank_1.log"
    [found] = [each for each in first.parent().children() if each != first and writes(each, log)]
    return found


def writes(process: psutil.Process, path: Path) -> bool:
    return any(Path(entry).resolve() == path for entry in Path(f"/proc/{process.pid}/fd").iterdir())
