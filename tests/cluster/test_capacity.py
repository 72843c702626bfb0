"""A run that does not start: what is said, and when it is given up, on real clusters with and without an autoscaler."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import fork_server
from autoscaling import autoscaling_cluster
from launching import Environment, command, run_of

HOLD = """
import sys, ray
from ray.util.placement_group import placement_group
ray.init(logging_level="error", log_to_driver=False)
ray.get(placement_group([{"CPU": 1}] * 6).ready())
print("held", flush=True)
sys.stdin.readline()
"""
"""Another job, with six of the cluster's eight CPUs until it is told to end."""


@pytest.fixture(scope="module")
def autoscaling() -> Iterator[Mapping[str, str]]:
    with autoscaling_cluster(most=2) as environment:
        yield environment


def train(config: Path, environment: Mapping[str, str], *overrides: str) -> subprocess.CompletedProcess[str]:
    return fork_server.run(command(config, *overrides), env=dict(environment), capture_output=True)


def test_more_than_the_autoscaler_can_add_ends_the_run_at_once(
    launch_config: Callable[..., Path], autoscaling: Mapping[str, str], tmp_path: Path
) -> None:
    config = launch_config("too_much", train={"steps": 3}, cluster={"workers": 5})
    done = train(config, autoscaling, f"data.cache={tmp_path / 'cache'}")
    assert done.returncode == 1
    assert "the run needs 5 workers; the cluster has room for 0" in done.stderr
    assert "its autoscaler can never add enough" in done.stderr
    assert not (tmp_path / "cache").exists(), "nothing is prepared before"


def test_nodes_that_an_autoscaler_adds_are_waited_for(
    launch_config: Callable[..., Path], autoscaling: Mapping[str, str]
) -> None:
    """A request for all five is refused whole: it continues with less, and the run starts with what that brings."""
    config = launch_config("added", train={"steps": 3}, cluster={"workers": [2, 5]})
    done = train(config, autoscaling)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for room: the run needs 2 workers; the cluster has room for 0" in done.stdout
    assert "autoscaler is adding: " in done.stdout
    assert "starting with 2 workers of 2 to 5" in done.stdout
    assert run_of(config).get_checkpoint_dir(3, 1).is_dir()


def test_a_cluster_that_is_too_small_without_an_autoscaler_ends_the_run_at_once(
    launch_config: Callable[..., Path], ray_environment: Environment, tmp_path: Path
) -> None:
    config = launch_config("too_small", cluster={"workers": 9})
    done = train(config, ray_environment, f"data.cache={tmp_path / 'cache'}")
    assert done.returncode == 1
    assert "the run needs 9 workers; the cluster has room for 8" in done.stderr
    assert "no autoscaler (version 2) adds nodes to it: set cluster.workers to 8" in done.stderr
    assert [line.split() for line in done.stderr.splitlines()][-3:] == [
        ["each", "worker", "(pack)", "9", "1"],
        ["each", "node", "1", "8"],
        ["in", "use", "together", "0"],
    ]
    assert not (tmp_path / "cache").exists(), "nothing is prepared before"


def test_a_busy_cluster_is_waited_for_and_who_uses_it_is_named(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("patient", train={"steps": 3}, cluster={"workers": 3})
    with fork_server.popen(
        [sys.executable, "-c", HOLD], env=ray_environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        given_up = train(config, ray_environment, "cluster.resource_timeout=1s")
        with fork_server.popen(command(config), env=ray_environment, stdout=subprocess.PIPE) as run:
            assert run.stdout is not None
            headline = next(line for line in run.stdout if "waiting for room" in line)
            table = [line.split() for _, line in zip(range(5), run.stdout, strict=False)]
            other.stdin.write("end\n")
            other.stdin.flush()
            assert run.wait() == 0
    assert given_up.returncode == 1
    assert "none came within cluster.resource_timeout = 1s" in given_up.stderr
    assert "has room for 2 (cluster.resource_timeout = 10m)" in headline
    assert table[2:4] == [["each", "node", "1", "8"], ["in", "use", "together", "6"]]
    assert (table[4][0], table[4][-1]) == ("by", "6")
