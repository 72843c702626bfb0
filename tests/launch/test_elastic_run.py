"""A run on a cluster of several nodes that come and go, and workers that die or hang: what happens, and what is said."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.conftest import Environment, command, run_of, wait_for_step
from llm_training_toolkit.runs import RunDirectory, attempt_record, last_attempt

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(300)]


class Nodes:
    """A Ray cluster whose head has no CPU, with a worker node of one CPU per address."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self._nodes: dict[str, Any] = {}
        for number in range(count):
            self.add(f"127.0.1.{number + 1}")

    def add(self, address: str) -> None:
        self._nodes[address] = self.cluster.add_node(num_cpus=1, node_ip_address=address)

    def lose(self, address: str) -> None:
        """Kill the node's Ray process, and so its workers, without a word."""
        self.cluster.remove_node(self._nodes.pop(address), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes(ray_environment: Environment) -> Iterator[Nodes]:
    several = Nodes(4)
    yield several
    several.cluster.shutdown()


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def workers_of(run: RunDirectory) -> list[int]:
    return [attempt_record(run, number)["workers"] for number in range(1, last_attempt(run) + 1)]


def until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(
    nodes: Nodes, launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    sections = {
        "train": {"steps": 400, "global_batch": 12, "micro_batch": 1},
        "checkpoint": {"every": 25, "keep": 2},
        "cluster": {"workers": [1, 4]},
    }
    config = launch_config("elastic", **sections)
    run = run_of(config)
    environment = {**ray_environment, "RAY_ADDRESS": nodes.cluster.address}
    t0 = time.time()
    with (
        open("/tmp/lab/elastic/screen", "w") as screen,
        subprocess.Popen(command(config), env=environment, stdout=screen, stderr=screen, text=True) as process,
    ):
        wait_for_step(run, 30, process)
        print("step 30", time.time() - t0)
        nodes.lose("127.0.1.2")
        print("lost", time.time() - t0)
        until(lambda: last_attempt(run) == 2, process)
        print("attempt 2", time.time() - t0)
        nodes.add("127.0.1.5")
        print("added", time.time() - t0)
        until(lambda: last_attempt(run) == 3, process)
        print("attempt 3", time.time() - t0)
        process.wait(timeout=120)
        print("end", time.time() - t0)
    print(open("/tmp/lab/elastic/screen").read())
    print(workers_of(run), [attempt_record(run, n) for n in range(1, last_attempt(run) + 1)])
    print(
        sorted({(r["attempt"]) for r in rows(run)}),
        [
            (
                a,
                min(r["step"] for r in rows(run) if r["attempt"] == a),
                max(r["step"] for r in rows(run) if r["attempt"] == a),
            )
            for a in (1, 2, 3)
        ],
    )
