"""Nodes that cannot work on a run are named before anything is prepared: real nodes, each with a disk of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import fork_server
from joining import wait_for_nodes
from launching import Environment, command, run_of
from unit.models.test_check_weights import QWEN3, published

RAY = str(Path(sys.executable).parent / "ray")


@pytest.fixture
def head(ray_environment: Environment) -> Iterator[str]:
    """A cluster whose head has no CPU."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster.address
    cluster.shutdown()


@contextmanager
def node(head: str, environment: Environment, address: str, before: str = "", gpus: int = 0) -> Iterator[None]:
    """A node of one CPU that declares GPUs and has run `before` in a mount namespace of its own."""
    start = f"exec {RAY} start --address {head} --num-cpus 1 --node-ip-address {address} --block --disable-usage-stats"
    start += f" --num-gpus {gpus}"
    command = ["sh", "-c", f"{before}\n{start}"]
    if before:
        command = ["unshare", "--mount", *command]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            wait_for_nodes(head, environment, address)
            yield
        finally:
            process.terminate()


def _may_mount() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, "--mount", "true"], check=False).returncode


@pytest.fixture
def other_version(tmp_path: Path) -> Path:
    """A folder with a toolkit of another version."""
    import llm_training_toolkit

    copy = tmp_path / "other" / "llm_training_toolkit"
    shutil.copytree(Path(llm_training_toolkit.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    initial = copy / "__init__.py"
    initial.write_text(initial.read_text() + '\n__version__ = "0.0.1"\n')
    return copy.parent


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Published weights of a Qwen3."""
    published(QWEN3, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.mark.skipif(not _may_mount(), reason="this user may not mount")
def test_all_that_is_wrong_with_nodes_is_said_at_once(
    head: str,
    launch_config: Callable[..., Path],
    ray_environment: Environment,
    tmp_path: Path,
    other_version: Path,
    weights: Path,
) -> None:
    config = launch_config(
        "unshared",
        cluster={"workers": 2},
        data={"cache": str(tmp_path / "cache")},
        model={"path": str(weights), "config_overrides": {}},
        tokenizer={"path": "not/asked-for", "train": None},
    )
    run, cache = run_of(config), tmp_path / "cache"
    run.path.mkdir(parents=True, exist_ok=True)
    cache.mkdir()
    hidden = f"mount -t tmpfs none {run.path} && mount -t tmpfs none {weights}"
    sealed = f"mount --bind {cache} {cache} && mount -o remount,bind,ro {cache}"
    older = {**ray_environment, "PYTHONPATH": f"{other_version}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with (
        node(head, ray_environment, "127.0.1.7", hidden),
        node(head, ray_environment, "127.0.1.8", sealed),
        node(head, older, "127.0.1.9"),
    ):
        done = fork_server.run(command(config), env={**ray_environment, "RAY_ADDRESS": head}, capture_output=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"node 127.0.1.7 does not see what was just written (run.dir = {run.path})" in done.stderr
    assert f"node 127.0.1.7 does not see model.path = {weights}" in done.stderr
    assert f"node 127.0.1.8 cannot write: Read-only file system (data.cache = {cache})" in done.stderr
    assert "node 127.0.1.9 has version 0.0.1 of the toolkit, this machine" in done.stderr
    assert not list(run.path.glob(".node-check*"))
    assert not run.resolved_config_path.exists()


def test_a_node_without_the_package_of_attention_is_named_before_data_is_prepared(
    head: str, launch_config: Callable[..., Path], ray_environment: Environment, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    config = launch_config(
        "unattended",
        cluster={"workers": 1, "gpus_per_worker": 1},
        data={"cache": str(cache)},
        model={"attn_implementation": "flash_attention_3"},
        train={"precision": "bf16"},
    )
    with node(head, ray_environment, "127.0.1.7", gpus=1):
        done = fork_server.run(command(config), env={**ray_environment, "RAY_ADDRESS": head}, capture_output=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "node 127.0.1.7 cannot compute model.attn_implementation = flash_attention_3" in done.stderr
    assert "flash-attn-3" in done.stderr
    assert not list(cache.iterdir())
    assert not run_of(config).resolved_config_path.exists()
