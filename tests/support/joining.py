"""Nodes that join a Ray cluster of this machine by `ray start`, each with an address of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import fork_server

_WAIT = """
import sys, time, ray
ray.init(address=sys.argv[1], logging_level="error", log_to_driver=False)
end = time.monotonic() + 300
while not set(sys.argv[2:]) <= {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}:
    assert time.monotonic() < end, ray.nodes()
    time.sleep(0.2)
"""


def wait_for_nodes(head: str, environment: Mapping[str, str], *addresses: str) -> None:
    """Wait until the nodes belong to the cluster."""
    asked = [sys.executable, "-c", _WAIT, head, *addresses]
    done = fork_server.run(asked, env=dict(environment), capture_output=True)
    assert done.returncode == 0, done.stderr
