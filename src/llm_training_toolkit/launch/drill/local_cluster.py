"""A Ray cluster on this machine, for drills that lose nodes: a head without CPUs, and nodes of their own addresses."""

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

import psutil

from llm_training_toolkit.launch.backend import prepare_environment
from llm_training_toolkit.launch.ray.cluster import RAY_WAITS_SETTING

_NETWORK = "127.0.1."
"""Addresses of this machine alone."""
_ADDRESSES = 250
_NOTICE = 60.0
"""Seconds that a notice of preemption leaves."""
_WAIT_FOR_HEAD = "15"
"""Seconds that everybody waits for a head that is gone, where Ray's own minute lets ranks do hundreds of steps."""
Node = Any
"""Ray's, which has no types."""


class OwnCluster:
    """A node for each worker. One that is lost is replaced at once, under another address."""

    def __init__(self, nodes: int, cpus: int) -> None:
        """Start it. Ray's processes end with this one, however it ends."""
        # Nobody else's jobs: the token is known to this process and the commands it starts.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.setdefault(RAY_WAITS_SETTING, _WAIT_FOR_HEAD)
        prepare_environment()
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._nodes, self._cpus, self._added = nodes, cpus, 0
        self.start()

    @property
    def environment(self) -> Mapping[str, str]:
        """What a command needs to join it."""
        return {"RAY_ADDRESS": self._cluster.address}

    def lose_node_of(self, process: int) -> None:
        """Kill the node that a rank's process is on, and another one comes."""
        self.lose(self._node_of(process))
        self._add()

    def announce_end_of(self, process: int) -> Node:
        """What a cloud's notice of preemption leads to: Ray drains the node of a rank's process. A new one comes."""
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason

        node = self._node_of(process)
        self._add()
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + _NOTICE) * 1e3)
        GcsClient(address=self._cluster.address).drain_node(node.node_id, reason, "preempted", deadline)
        return node

    def lose(self, node: Node) -> None:
        """Kill a node's Ray process, and with it its workers."""
        self._cluster.remove_node(node, allow_graceful=False)

    def lose_head(self) -> None:
        """Kill the head's processes; the nodes stay, as they would elsewhere."""
        self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)

    def start(self) -> None:
        """Start it, with an address that no cluster had before."""
        from ray.cluster_utils import Cluster

        self._place = tempfile.mkdtemp(prefix="ltt-drill-")  # not deeper: Ray's sockets need a short path
        os.environ["RAY_TMPDIR"] = self._place  # where also stands which cluster a command without address joins
        head = {"num_cpus": 0, "include_dashboard": False}
        with _sigterm_as_it_is():
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for _ in range(self._nodes):
            self._add()

    def close(self) -> None:
        """End all of its processes."""
        self._cluster.shutdown()
        shutil.rmtree(self._place, ignore_errors=True)

    def _add(self) -> None:
        address = f"{_NETWORK}{1 + self._added % _ADDRESSES}"
        self._added += 1
        with _sigterm_as_it_is():
            self._cluster.add_node(num_cpus=self._cpus, node_ip_address=address)

    def _node_of(self, process: int) -> Node:
        """The node whose Ray process has started a rank's."""
        above = {parent.pid for parent in psutil.Process(process).parents()}
        [node] = [node for node in self._cluster.worker_nodes if _raylet(node) in above]
        return node


@contextmanager
def _sigterm_as_it_is() -> Iterator[None]:
    """Take back the handler of a Ray node: with it this process would take half a minute to end."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raylet(node: Node) -> int:
    [raylet] = node.all_processes["raylet"]
    return int(raylet.process.pid)
