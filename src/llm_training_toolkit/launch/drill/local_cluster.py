"""Ray cluster on this machine for drills that kill nodes: a head without CPUs, and nodes with their own addresses."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llm_training_toolkit.launch.backend import prepare_environment
from llm_training_toolkit.launch.signals import start_processes_in_own_session
from llm_training_toolkit.setup.machine import RAY_HEAD_TIMEOUT_VARIABLE

_ADDRESS_PREFIX = "127.0.1."  # loopback: this machine alone
_ADDRESS_COUNT = 250
_PREEMPTION_NOTICE_SECONDS = 60.0  # from a preemption notice to the loss of the node
_HEAD_TIMEOUT_SECONDS = "15"  # until processes give up a lost head; in Ray's 60 s ranks would do hundreds of steps
RayNode = Any  # Ray has no types


class LocalCluster:
    """Cluster with one node per worker. A lost node is replaced at once, under another address."""

    def __init__(self, nodes: int, cpus: int) -> None:
        """Start the cluster. Ray's processes end with this one, however it ends."""
        # Only this process and the commands it starts know the token, which keeps other jobs out.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.setdefault(RAY_HEAD_TIMEOUT_VARIABLE, _HEAD_TIMEOUT_SECONDS)
        prepare_environment()
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._nodes, self._cpus, self._added = nodes, cpus, 0
        self.start_cluster()

    @property
    def environment_variables(self) -> Mapping[str, str]:
        """Environment variables with which a command joins the cluster."""
        return {"RAY_ADDRESS": self._cluster.address}

    def replace_node(self, address: str) -> None:
        """Kill the node with this address and add another one."""
        self.kill_node(self._get_node(address))
        self._add_worker_node()

    def drain_node(self, address: str) -> RayNode:
        """Drain the node with this address, as after a cloud's preemption notice. Add a new one, return the old."""
        from llm_training_toolkit.launch.ray.private_api import drain_node

        node = self._get_node(address)
        self._add_worker_node()
        drain_node(self._cluster.address, node.node_id, int((time.time() + _PREEMPTION_NOTICE_SECONDS) * 1e3))
        return node

    def kill_node(self, node: RayNode) -> None:
        """Kill a node's Ray process, and its workers with it."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_head(self) -> None:
        """Kill the head's processes; the nodes stay, as on a real cluster."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def start_cluster(self) -> None:
        """Start the cluster at an address that was never used before."""
        from ray.cluster_utils import Cluster

        self._temp_dir = tempfile.mkdtemp(prefix="ltt-drill-")  # not nested: Ray's sockets need a short path
        os.environ["RAY_TMPDIR"] = self._temp_dir  # also names the cluster that a command without an address joins
        head = {"num_cpus": 0, "include_dashboard": False}
        with _start_ray_processes():
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(self._nodes):
            self._add_worker_node()

    def close(self) -> None:
        """End all processes of the cluster."""
        self._cluster.shutdown()
        shutil.rmtree(self._temp_dir, ignore_errors=True)

    def _add_worker_node(self) -> None:
        address = f"{_ADDRESS_PREFIX}{1 + self._added % _ADDRESS_COUNT}"
        self._added += 1
        with _start_ray_processes():
            self._cluster.add_node(num_cpus=self._cpus, node_ip_address=address)

    def _get_node(self, address: str) -> RayNode:
        [node] = [node for node in self._cluster.worker_nodes if node.node_ip_address == address]
        return node


@contextmanager
def _start_ray_processes() -> Iterator[None]:
    """Keep signals to the drill away from Ray's processes, and restore the SIGTERM handler that a Ray node replaces.

    With Ray's handler this process takes half a minute to end.
    """
    previous_handler = signal.getsignal(signal.SIGTERM)
    try:
        with start_processes_in_own_session():
            yield
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
