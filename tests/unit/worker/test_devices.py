"""Which ranks may work together on which devices, and what is said of it; pure."""

from __future__ import annotations

import re

import pytest

from llm_training_toolkit.worker.devices import (
    RankPlacement,
    find_parted_replicas,
    find_placement_problem,
    find_placement_warnings,
    format_placement,
)
from tiny_runs import tiny_config

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


def gpu(node: str, number: int, model: str = H100, unit: str = "") -> RankPlacement:
    return RankPlacement(node, node, number, f"cuda:{number}", model, unit or f"{node}-{number}", 128)


def cpu(node: str, number: int, cores: int = 8) -> RankPlacement:
    return RankPlacement(node, node, number, "cpu", "", "", cores)


TWO_NODES = [gpu(node, number) for node in ("a", "b") for number in range(8)]


@pytest.mark.parametrize(
    "placements", [TWO_NODES, [cpu("a", 0), cpu("a", 1), cpu("b", 0)], [gpu("a", 0)], [cpu("a", 0)]]
)
def test_ranks_with_a_device_each_may_work(placements: list[RankPlacement]) -> None:
    assert find_placement_problem(placements, "auto") is None
    assert find_placement_problem(placements, 0 if placements[0].device_type == "cpu" else 1) is None


@pytest.mark.parametrize(
    ("placements", "asked", "words"),
    [
        (
            [gpu("a", 0), gpu("a", 1), gpu("a", 2, unit="a-1")],
            "auto",
            "ranks 1 and 2 share one GPU, NVIDIA H100 .* a-1 of",
        ),
        ([gpu("a", 0), cpu("b", 0)], "auto", r"kinds: rank 0 on cuda \(node a\); rank 1 on cpu \(node b\)"),
        ([cpu("a", 0), cpu("a", 1)], 1, "cluster.gpus_per_worker = 1, but the ranks compute on cpu"),
        ([gpu("a", 0), gpu("a", 1)], 0, "cluster.gpus_per_worker = 0, but the ranks compute on cuda"),
        ([cpu("a", 0), cpu("b", 0), cpu("a", 0)], 0, "ranks 0 and 2 all have LOCAL_RANK = 0 on node a"),
    ],
)
def test_what_cannot_be_right_is_named(placements: list[RankPlacement], asked: int | str, words: str) -> None:
    found = find_placement_problem(placements, asked)
    assert found is not None
    assert re.search(words, found), found


def test_two_machines_of_one_name_are_two() -> None:
    assert (
        find_placement_problem([cpu("localhost", 0), RankPlacement("localhost", "other", 0, "cpu", "", "", 8)], "auto")
        is None
    )


def test_the_line_at_the_start() -> None:
    assert format_placement(TWO_NODES) == (
        "ranks 0 to 7 on node a (cuda:0 to cuda:7), ranks 8 to 15 on node b (cuda:0 to cuda:7), "
        "each NVIDIA H100 80GB HBM3"
    )
    assert (
        format_placement([cpu("a", 0), cpu("b", 0), cpu("a", 1)])
        == "ranks 0 and 2 on node a (cpu), rank 1 on node b (cpu)"
    )
    many = [gpu(f"n{node}", number) for node in range(64) for number in range(8)]
    assert format_placement(many) == (
        "512 ranks: 64 nodes with 8 each, on cuda, each NVIDIA H100 80GB HBM3; which is where is in the attempt's file"
    )


def test_slow_company_is_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("seats")
    config = tiny_config(folder, folder, cluster={"cpus_per_worker": 4})
    assert find_placement_warnings(TWO_NODES, config) == []
    [mixed] = find_placement_warnings([gpu("a", 0), gpu("a", 1), gpu("b", 0, A100)], config)
    assert mixed.startswith("GPUs of several models: ranks 0 and 1 on NVIDIA H100 80GB HBM3, rank 2 on NVIDIA A100")
    [crowded] = find_placement_warnings([cpu("a", 0), cpu("a", 1), cpu("a", 2), cpu("b", 0)], config)
    assert crowded.startswith("node a has 8 cores for 3 ranks with 4 threads each")


def test_replicas_on_several_nodes_are_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("seats")
    config = tiny_config(folder, folder, engine={"sequence_parallel": 2}, cluster={"cpus_per_worker": 1})
    apart = [cpu("a", 0), cpu("a", 1), cpu("a", 2), cpu("b", 0)]
    [parted] = find_placement_warnings(apart, config)
    assert parted.startswith("ranks 2 and 3 share rows")
    assert find_placement_warnings(apart[:2], config) == []


@pytest.mark.parametrize(("ranks", "parted"), [(6, [[2, 3], [4, 5]]), (5, [[2, 3]]), (1, [])])
def test_ranks_beside_whole_replicas_are_no_parted_replica(ranks: int, parted: list[list[int]]) -> None:
    assert find_parted_replicas(["a", "a", "a", "b", "b", "c"][:ranks], 2) == parted
