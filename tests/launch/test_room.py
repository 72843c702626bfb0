"""How many workers fit into a cluster, and when a run makes way for more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.distributed.context import Wish
from llm_training_toolkit.distributed.heartbeat import Pulse
from llm_training_toolkit.launch.ray.control_actor import _Control
from llm_training_toolkit.launch.ray.resources import Node, Wanted, room_beside, runs_at_once, usable
from llm_training_toolkit.launch.ray.scaling_policy import Growth

ONE = {"CPU": 1.0}


def node(number: int, total: float = 2.0, free: float | None = None, *, taken_away: bool = False) -> Node:
    left = {"CPU": total if free is None else free}
    return Node(f"id{number}", f"10.0.0.{number}", 1, {"CPU": total}, left, taken_away)


def wanted(fewest: int = 1, most: int = 8, placement: str = "pack", each: dict[str, float] | None = None) -> Wanted:
    return Wanted(fewest, most, each or ONE, placement)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 3), st.integers(1, 12))
def test_what_fits_is_summed_over_nodes_and_never_splits_a_worker(cpus: list[int], each: int, most: int) -> None:
    nodes = [{"CPU": float(count)} for count in cpus]
    fitting = [count // each for count in cpus]
    need = {"CPU": float(each)}
    assert wanted(most=most, each=need).room(nodes) == min(sum(fitting), most)
    assert wanted(most=most, each=need, placement="spread").room(nodes) == min(sum(fitting), most)
    assert wanted(most=most, each=need, placement="strict_pack").room(nodes) == min(max(fitting, default=0), most)
    strictly = wanted(most=most, each=need, placement="strict_spread").room(nodes)
    assert strictly == min(sum(count > 0 for count in fitting), most)


def test_a_worker_needs_all_of_its_resources_on_one_node() -> None:
    gpu = wanted(each={"CPU": 2.0, "GPU": 1.0})
    assert gpu.room([{"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 3.0, "GPU": 4.0}]) == 3
    assert gpu.room([{"CPU": 1.9999999, "GPU": 1.0}]) == 1, "Ray's arithmetic is not exact"


def test_nodes_to_leave_out_are_used_only_where_the_fewest_workers_need_them() -> None:
    nodes = [node(1), node(2), node(3, taken_away=True)]
    assert usable(nodes, wanted(fewest=2), {"10.0.0.1"}) == [nodes[1]]
    assert usable(nodes, wanted(fewest=3), {"10.0.0.1"}) == nodes[:2]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5))
def test_a_run_that_holds_places_finds_those_again(counts: list[tuple[int, int]]) -> None:
    nodes = [node(number, float(own + free), float(free)) for number, (own, free) in enumerate(counts)]
    own = {f"id{number}": held for number, (held, _) in enumerate(counts)}
    assert room_beside(nodes, wanted(most=99), own) == sum(own.values()) + sum(free for _, free in counts)


def look(growth: Growth, nodes: list[Node], seconds: range) -> list[Wish]:
    own = {"id1": growth.size}
    return [growth.wish(nodes, own, float(now)) for now in seconds if growth.due(float(now))]


def test_growing_waits_for_steady_room_and_the_next_checkpoint() -> None:
    growth = Growth(wanted(most=4), 2, left_out=())
    full, more = [node(1, free=0.0)], [node(1, free=0.0), node(2, 1.0)]
    assert set(look(growth, full, range(20))) == {Wish.GO_ON}
    assert look(growth, more, range(21, 25)) == [Wish.GO_ON] * 2
    assert set(look(growth, full, range(27, 28))) == {Wish.GO_ON}, "it went away again"
    assert look(growth, more, range(30, 35)) == [Wish.GO_ON] * 2
    assert look(growth, more, range(36, 37)) == [Wish.LEAVE_WHEN_SAVED]
    assert look(growth, more, range(330, 331)) == [Wish.LEAVE]


def test_a_run_at_its_largest_size_does_not_look() -> None:
    assert look(Growth(wanted(most=2), 2, left_out=()), [node(1), node(2)], range(20)) == []


def test_a_node_that_is_left_out_is_no_room() -> None:
    growth = Growth(wanted(most=4), 2, left_out={"10.0.0.2"})
    assert set(look(growth, [node(1, free=0.0), node(2)], range(40))) == {Wish.GO_ON}


def test_leaving_after_a_checkpoint_is_taken_back_and_nothing_else_is() -> None:
    control = _Control()
    told = Pulse().read()
    control.want(Wish.LEAVE_WHEN_SAVED)
    control.stay()
    assert control.beat(0, told) is Wish.GO_ON
    for wish in (Wish.LEAVE, Wish.STOP):
        control.want(wish)
        control.stay()
        control.want(Wish.LEAVE_WHEN_SAVED)
        assert control.beat(0, told) is wish


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
    trial = Wanted(workers, workers, {"CPU": 2.0}, placement)
    assert runs_at_once([{"CPU": 2.0 * count + 1.0} for count in nodes], trial) == placed(nodes, workers, placement)
