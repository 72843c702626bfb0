"""Messages about a run without room; pure."""

from __future__ import annotations

from llm_training_toolkit.launch.ray.capacity import AutoscalerStatus, format_autoscaler_status, format_capacity_table
from llm_training_toolkit.launch.ray.resources import ClusterNode, ResourceRequest, Resources, compute_usage_by_others

GPU_WORKER = {"GPU": 1.0, "CPU": 8.0}


def node(number: int, total: Resources, free: Resources) -> ClusterNode:
    return ClusterNode(id=str(number), address=f"10.0.0.{number}", port=1, total=total, free=free)


def test_capacity_table_of_a_used_cluster() -> None:
    full = {"GPU": 4.0, "CPU": 64.0}
    nodes = [node(1, full, {"GPU": 2.0, "CPU": 48.0}), node(2, full, full), node(3, {"CPU": 0.5}, {"CPU": 0.5})]
    usage = {"`ltt train a.yaml` (job 02)": {"GPU": 2.0, "CPU": 16.0}}
    assert format_capacity_table(ResourceRequest(8, 8, GPU_WORKER, "pack"), nodes, usage) == [
        "                                    count  GPU  CPU",
        "  each worker (pack)                    8    1    8",
        "  each node                             2    4   64",
        "  each node                             1    0  0.5",
        "  in use together                            2   16",
        "    by `ltt train a.yaml` (job 02)           2   16",
    ]


def test_capacity_table_of_a_cluster_without_nodes() -> None:
    assert format_capacity_table(ResourceRequest(1, 2, {"CPU": 8.0}, "strict_pack"), [], {}) == [
        "                             count  CPU",
        "  each worker (strict_pack)      1    8",
        "  in use together                     0",
    ]


def test_autoscaler_status() -> None:
    assert format_autoscaler_status(None) == []
    assert format_autoscaler_status(AutoscalerStatus({"gpu": 1, "cpu": 2})) == ["  autoscaler is adding: 2 cpu, 1 gpu"]
    assert format_autoscaler_status(AutoscalerStatus({}, ("gpu: no capacity",))) == [
        "  autoscaler is adding: nothing yet",
        "  autoscaler failed to start gpu: no capacity",
    ]


def test_what_others_use_leaves_out_the_own_workers() -> None:
    nodes = [
        node(1, {"CPU": 4.0}, {"CPU": 1.0}),
        node(2, {"CPU": 4.0}, {"CPU": 2.0}),
        node(3, {"GPU": 1.0}, {"GPU": 1.0}),
    ]
    assert compute_usage_by_others(nodes, ResourceRequest(1, 4, {"CPU": 1.0}, "pack"), {"1": 1, "2": 2}) == [
        {"CPU": 2.0}
    ]
