"""`ltt drill` of a run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e.test_drill import drill, get_drill_environment, sections
from ray_workers import environment_with_forked_workers


def test_a_cluster_of_several_nodes_survives_what_only_a_cluster_can_have(launch_config: Callable[..., Path]) -> None:
    """A hang and a preempted node, in test_elastic too, are left to `make drill`: two minutes each.

    A start counts as a hang after three times as long. With this seed the head goes first, after 37 steps: the ranks of
    a fast machine do two hundred more until they give it up.
    """
    variables = get_drill_environment() | {"RAY_AUTH_MODE": "token", "RAY_health_check_period_ms": "1000"}
    with environment_with_forked_workers(variables) as environment:
        config = launch_config("drilled-on-ray", **sections(360, 4, 2))
        drill(config, "node", "head", environment=environment, seed=9, hang="60s")
