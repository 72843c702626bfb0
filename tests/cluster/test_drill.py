"""`ltt drill` of a run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e.test_drill import drill, get_drill_environment, sections
from ray_workers import environment_with_forked_workers


def test_a_cluster_of_several_nodes_survives_what_only_a_cluster_can_have(launch_config: Callable[..., Path]) -> None:
    """A hang and a preempted node, in test_elastic too, are left to `make drill`: two minutes each.

    A start counts as a hang after three times as long.
    """
    with environment_with_forked_workers(get_drill_environment() | {"RAY_AUTH_MODE": "token"}) as environment:
        drill(
            launch_config("drilled-on-ray", **sections(600, 4, 2)), "node", "head", environment=environment, hang="60s"
        )
