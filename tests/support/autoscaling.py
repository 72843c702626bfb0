"""A Ray cluster of this machine whose autoscaler adds nodes for real: each is one more Ray process here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from machine_limits import find_free_port

_HEAD = "f" * 51 + "00000"
"""The head's name for the provider of nodes below."""
_COMMANDS = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
"""Lists that Ray's configuration of a cluster must have, here empty: its provider needs no machine set up."""
_RAY = str(Path(sys.executable).parent / "ray")


@contextmanager
def autoscaling_cluster(most: int) -> Iterator[Mapping[str, str]]:
    """A head without CPU and up to `most` nodes of the type `cpu-worker` with one; the environment to join it with."""
    folder = Path(tempfile.mkdtemp(prefix="ltt-auto-"))  # a socket's path must be short
    port = find_free_port()
    address = f"127.0.0.1:{port}"
    file = folder / "autoscaler.json"
    file.write_text(json.dumps(_configuration(address, most)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_enable_autoscaler_v2": "1", "RAY_FAKE_CLUSTER": "1"}
    environment["RAY_worker_niceness"] = "0"
    head = {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD, "RAY_CLOUD_INSTANCE_ID": _HEAD}
    head["RAY_NODE_TYPE_NAME"] = "ray.head.default"
    command = [_RAY, "start", "--head", "--block", "--num-cpus", "0", "--port", str(port), "--temp-dir", str(folder)]
    command += ["--include-dashboard=false", f"--autoscaling-config={file}", "--disable-usage-stats"]
    command += [
        "--ray-client-server-port",
        str(find_free_port()),
        "--dashboard-agent-listen-port",
        str(find_free_port()),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment | head, stdout=log, stderr=log)
    try:
        _wait_for(address, environment, process, folder / "log")
        yield environment | {"RAY_ADDRESS": address}
    finally:
        process.terminate()
        process.wait(timeout=300)
        for left in [found for found in psutil.process_iter() if _works_in(found, folder)]:  # nodes it has added
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False


def _wait_for(address: str, environment: Mapping[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 300
    ask = [_RAY, "health-check", "--address", address]
    while subprocess.run(ask, env=environment, capture_output=True, check=False).returncode:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()


def _configuration(address: str, most: int) -> dict[str, Any]:
    """Ray's own provider for tests, named as an external one: the wheel lacks the file of its defaults."""
    provider = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "min_workers": 0, "max_workers": most}
    return {
        "cluster_name": "test",
        "max_workers": most,
        "idle_timeout_minutes": 10,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": _HEAD,
            "launch_multiple": True,
        },
        "auth": {"ssh_user": "nobody"},
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu-worker": {"node_config": {}, **worker},
        },
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **dict.fromkeys(["cluster_synced_files", "rsync_exclude", "rsync_filter"], ()),
        **{f"{name}_commands": [] for name in _COMMANDS},
    }
