"""How many workers fit into a cluster, and when a run makes way for more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.heartbeat import Heartbeat
from llm_training_toolkit.launch.ray.control_actor import _ControlActor
from llm_training_toolkit.launch.ray.resources import (
    ClusterNode,
    ResourceRequest,
    count_concurrent_runs,
    count_fitting_after_drain,
    schedulable_nodes,
)
from llm_training_toolkit.launch.ray.scaling_policy import ElasticScalingPolicy

ONE = {"CPU": 1.0}


def node(number: int, total: float = 2.0, free: float | None = None, *, taken_away: bool = False) -> ClusterNode:
    left = {"CPU": total if free is None else free}
    return ClusterNode(f"id{number}", f"10.0.0.{number}", 1, {"CPU": total}, left, taken_away)


def wanted(
    fewest: int = 1, most: int = 8, placement: str = "pack", each: dict[str, float] | None = None
) -> ResourceRequest:
    return ResourceRequest(fewest, most, each or ONE, placement)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_what_fits_is_summed_over_nodes_and_never_splits_a_worker(cpus: list[int], each: int, most: int) -> None:
    nodes = [{"CPU": float(count)} for count in cpus]
    fitting = [count // each for count in cpus]
    need = {"CPU": float(each)}
    assert wanted(most=most, each=need).count_fitting_workers(nodes) == min(sum(fitting), most)
    assert wanted(most=most, each=need, placement="spread").count_fitting_workers(nodes) == min(sum(fitting), most)
    assert wanted(most=most, each=need, placement="strict_pack").count_fitting_workers(nodes) == min(
        max(fitting, default=0), most
    )
    strictly = wanted(most=most, each=need, placement="strict_spread").count_fitting_workers(nodes)
    assert strictly == min(sum(count > 0 for count in fitting), most)


def test_a_worker_needs_all_of_its_resources_on_one_node() -> None:
    gpu = wanted(each={"CPU": 2.0, "GPU": 1.0})
    assert gpu.count_fitting_workers([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 4.0}]) == 3
    assert gpu.count_fitting_workers([{"CPU": 1.9999999, "GPU": 1.0}]) == 1, "Ray's arithmetic is not exact"


def test_nodes_to_leave_out_are_used_only_where_the_fewest_workers_need_them() -> None:
    nodes = [node(1), node(2), node(3, taken_away=True)]
    assert schedulable_nodes(nodes, wanted(fewest=2), {"10.0.0.1"}) == [nodes[1]]
    assert schedulable_nodes(nodes, wanted(fewest=3), {"10.0.0.1"}) == nodes[:2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_a_run_that_holds_places_finds_those_again(counts: list[tuple[int, int]]) -> None:
    nodes = [node(number, float(own + free), float(free)) for number, (own, free) in enumerate(counts)]
    own = {f"id{number}": held for number, (held, _) in enumerate(counts)}
    assert count_fitting_after_drain(nodes, wanted(most=99), own) == sum(own.values()) + sum(free for _, free in counts)


def look(growth: ElasticScalingPolicy, nodes: list[ClusterNode], seconds: range) -> list[StopRequest]:
    own = {"id1": growth.size}
    return [growth.decide_drain(nodes, own, float(now)) for now in seconds if growth.is_check_due(float(now))]


def test_growing_waits_for_steady_room_and_the_next_checkpoint() -> None:
    growth = ElasticScalingPolicy(wanted(most=4), 2, excluded_nodes=())
    full, more = [node(1, free=0.0)], [node(1, free=0.0), node(2, 1.0)]
    assert set(look(growth, full, range(20))) == {StopRequest.NONE}
    assert look(growth, more, range(21, 25)) == [StopRequest.NONE] * 2
    assert set(look(growth, full, range(27, 28))) == {StopRequest.NONE}, "it went away again"
    assert look(growth, more, range(30, 35)) == [StopRequest.NONE] * 2
    assert look(growth, more, range(36, 37)) == [StopRequest.DRAIN_AFTER_CHECKPOINT]
    assert look(growth, more, range(330, 331)) == [StopRequest.DRAIN]


def test_a_run_at_its_largest_size_does_not_look() -> None:
    assert look(ElasticScalingPolicy(wanted(most=2), 2, excluded_nodes=()), [node(1), node(2)], range(20)) == []


def test_a_node_that_is_left_out_is_no_room() -> None:
    growth = ElasticScalingPolicy(wanted(most=4), 2, excluded_nodes={"10.0.0.2"})
    assert set(look(growth, [node(1, free=0.0), node(2)], range(40))) == {StopRequest.NONE}


def test_leaving_after_a_checkpoint_is_taken_back_and_nothing_else_is() -> None:
    control = _ControlActor()
    told = Heartbeat().get_snapshot()
    control.request_stop(StopRequest.DRAIN_AFTER_CHECKPOINT)
    control.cancel_drain()
    assert control.receive_heartbeat(0, told).stop_request is StopRequest.NONE
    for stop_request in (StopRequest.DRAIN, StopRequest.STOP):
        control.request_stop(stop_request)
        control.cancel_drain()
        control.request_stop(StopRequest.DRAIN_AFTER_CHECKPOINT)
        assert control.receive_heartbeat(0, told).stop_request is stop_request


def test_every_rank_hears_of_a_hang_in_the_reply_to_its_heartbeat() -> None:
    control, told = _ControlActor(), Heartbeat().get_snapshot()
    assert not control.receive_heartbeat(1, told).is_hung
    control.report_hang()
    assert all(control.receive_heartbeat(rank, told).is_hung for rank in (0, 1))


def placed(nodes: list[int], workers: int, placement: str) -> int:
    """Runs that can be placed one after the other, by trying: the fullest nodes first."""
    free, runs = list(nodes), 0
    while True:
        order = sorted(range(len(free)), key=lambda node: -free[node])
        if placement == "strict_pack":
            taken = [order[0]] * workers if free and free[order[0]] >= workers else []
        elif placement == "strict_spread":
            taken = [node for node in order if free[node]][:workers]
        else:
            taken = [node for node in order for _ in range(free[node])][:workers]
        if len(taken) < workers:
            return runs
        for node in taken:
            free[node] -= 1
        runs += 1


@given(
    nodes=st.lists(st.integers(0, 6), max_size=5),
    workers=st.integers(1, 5),
    placement=st.sampled_from(["pack", "spread", "strict_pack", "strict_spread"]),
)
def test_as_many_runs_at_once_as_can_be_placed(nodes: list[int], workers: int, placement: str) -> None:
    trial = ResourceRequest(workers, workers, {"CPU": 2.0}, placement)
    assert count_concurrent_runs([{"CPU": 2.0 * count + 1.0} for count in nodes], trial) == placed(
        nodes, workers, placement
    )


def test_groups_have_whole_replicas() -> None:
    wanted = ResourceRequest(2, 6, ONE, "pack", multiple=2)
    fitting = [wanted.count_fitting_workers([{"CPU": float(cores)}]) for cores in range(9)]
    assert fitting == [0, 0, 2, 2, 4, 4, 6, 6, 6]
    assert wanted.count_fitting_workers([{"CPU": 3.0}, {"CPU": 2.0}]) == 4
