"""A node whose memory runs out: Ray ends a process of it, the run says so and continues."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import fork_server
from launching import Environment, command, run_of, wait_for_step
from llm_training_toolkit.launch.drill.faults import read_latest_step
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory

ROOM = 5_000_000_000
"""Bytes that the cluster may take beyond what was in use before: a run of two workers takes half of it."""
PIECE = 100_000_000


@pytest.fixture
def tight(ray_environment: Environment) -> Iterator[Environment]:
    """Two nodes whose memory is full when ROOM more of the machine's is in use than now."""
    from ray._private.utils import get_system_memory, get_used_memory
    from ray.cluster_utils import Cluster

    total, used = get_system_memory(), get_used_memory()
    if used + 1.5 * ROOM > total:
        pytest.skip(f"{(total - used) / 1e9:.0f} GB of memory are free here, too few to fill")
    limits = {"memory_usage_threshold": (used + ROOM) / total, "memory_monitor_refresh_ms": 100}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": limits}
    )
    for address in ("127.0.1.1", "127.0.1.2"):
        cluster.add_node(num_cpus=1, node_ip_address=address)
    yield {**ray_environment, "RAY_ADDRESS": cluster.address}
    cluster.shutdown()


def fill_memory(run: RunDirectory) -> None:
    """Take memory, bit by bit, until a process of the run is ended for it; then give it back."""
    taken: list[bytearray] = []
    while read_attempt_record(run, 1).get("state") == "running":
        if len(taken) * PIECE < ROOM:
            taken.append(bytearray(b"\1") * PIECE)
        time.sleep(0.02)


def test_ranks_that_are_ended_for_their_memory_are_replaced_and_it_is_said(
    launch_config: Callable[..., Path], tight: Environment
) -> None:
    train = {"steps": 400, "global_batch_size": 20, "micro_batch_size": 2}
    config = launch_config("tight", train=train, checkpoint={"interval": 5, "keep_latest": 2})
    run = run_of(config)
    with fork_server.popen(command(config), env=tight, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for_step(run, 6, process)
        fill_memory(run)
        while read_latest_step(run)[0] == 1:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    failure = read_attempt_record(run, 1)["failure"]
    assert failure["kind"] == "oom", out
    assert "the memory of " in failure["cause"]
    assert "GB" in failure["cause"]
    assert failure["cause"] in out
    assert "Traceback" not in out
