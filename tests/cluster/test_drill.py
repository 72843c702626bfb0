"""`ltt drill` of a run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e.test_drill import drill, sections


def test_a_cluster_of_several_nodes_survives_what_only_a_cluster_can_have(launch_config: Callable[..., Path]) -> None:
    """A hang and a preempted node, in test_elastic_run too, are left to `make drill`: two minutes each."""
    drill(launch_config("drilled-on-ray", **sections(600, 4, 2)), "node", "head", hang="5s")
