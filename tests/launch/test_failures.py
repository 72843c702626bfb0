"""What counts as the cause of a failure, and when no new workers may start: decided from what was seen and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config.schema import Failures
from llm_training_toolkit.launch.ray.failure_cause import Seen, Worker, diagnose
from llm_training_toolkit.launch.ray.failure_policy import Failure, failures_of, nodes_to_leave_out, spent, why_end

WORKERS = {
    rank: Worker(rank, f"id{rank // 2}", f"10.0.0.{rank // 2}", 100 + rank, 1.0, f"a{rank}", "p") for rank in range(4)
}
CLOSED = {"kind": "error", "rank": 0, "text": "RuntimeError: Connection closed by peer", "helped": False}
MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.1, ID: abc) where the task was running was 6.25GB / 7.00GB (0.89). Refer to the manual"""


def killed(step: int, node: str | None = "10.0.0.1") -> Failure:
    return Failure("killed", f"rank 1 failed at {step}", step, 1, node)


def kept(*failures: Failure | None) -> dict[int, Failure]:
    """As if each was read back from its attempt."""
    records: dict[int, dict[str, Any]] = {
        number: {"failure": failure.to_json()} if failure else {} for number, failure in enumerate(failures, start=1)
    }
    return failures_of(records)


def test_connections_that_the_others_lost_are_not_the_cause() -> None:
    dead = diagnose(Seen(WORKERS, [CLOSED], deaths={2: ("killed", "End of file")}), 7)
    assert (dead.kind, dead.rank, dead.node, dead.step) == ("killed", 2, "10.0.0.1", 7)
    assert "rank 2 failed: its process 102 on node 10.0.0.1" in dead.cause
    lost = diagnose(Seen(WORKERS, [CLOSED], deaths={2: ("killed", "")}, lost=frozenset({"id1"})), 7)
    assert (lost.kind, lost.node) == ("node lost", "10.0.0.1")
    assert lost.cause == "node 10.0.0.1 with ranks 2, 3 is lost"
    told = diagnose(Seen(WORKERS, [{**CLOSED, "rank": 3, "text": "ValueError: bad"}, CLOSED]), 7)
    assert (told.kind, told.rank, told.cause) == ("raised", 3, "rank 3 failed: ValueError: bad")


def test_memory_is_named_with_its_numbers_before_other_deaths() -> None:
    found = diagnose(Seen(WORKERS, [CLOSED], deaths={0: ("killed", ""), 3: ("out of memory", MEMORY)}), 1)
    assert (found.kind, found.rank) == ("out of memory", 3)
    assert "the memory of node 10.0.0.1 ran out" in found.cause
    assert "6.25GB / 7.00GB" in found.cause
    helper = diagnose(Seen(WORKERS, memory=MEMORY), 1)
    assert helper.kind == "out of memory"
    assert "driver's node" in helper.cause


def test_a_hang_a_remedy_and_an_announced_end_come_first() -> None:
    everything = Seen(WORKERS, [CLOSED], deaths={0: ("killed", "")}, lost=frozenset({"id0"}))
    hang = diagnose(replace(everything, hang="no rank has advanced", hung=WORKERS[1]), 3)
    assert (hang.kind, hang.rank, hang.node, hang.counts) == ("hang", 1, "10.0.0.0", True)
    helped = diagnose(replace(everything, errors=[CLOSED, {**CLOSED, "rank": 2, "helped": True, "text": "smaller"}]), 3)
    assert (helped.cause, helped.counts) == ("smaller", False)
    announced = diagnose(replace(everything, taken_away=frozenset({"id0"})), 3)
    assert (announced.kind, announced.counts) == ("taken away", False)


def test_what_only_ray_knows_is_its_last_line() -> None:
    assert diagnose(Seen({}, said="a\n\n  no place\n"), 1).cause == "the workers did not start: no place"
    assert diagnose(Seen(WORKERS, said=""), 1).cause == "the workers ended: Ray gives no reason"


POLICY = Failures(max=2, same_step=2)


def test_the_budget_ends_and_a_checkpoint_refills_it() -> None:
    three = kept(killed(3), killed(5), killed(8))
    assert "All restarts (failures.max = 2) are used up" in why_end(three, 0, POLICY)
    assert why_end(three, 2, POLICY) == "", "attempt 2 saved, so only its own failure and the next one count"
    assert spent(three, 3) == 1
    assert why_end(kept(killed(3)), 0, Failures(max=0)) != ""


def test_the_same_step_twice_ends_the_run_whatever_was_saved_in_between() -> None:
    twice = kept(killed(3), killed(8), None, killed(8))
    why = why_end(twice, 4, POLICY)
    assert why.startswith("step 8 failed twice in a row")
    assert why.endswith("The last time rank 1 failed at 8")
    assert why_end(kept(killed(8), killed(3), killed(8)), 3, POLICY) == ""
    lost = Failure("node lost", "node is lost", 8, 1, "10.0.0.1")
    assert why_end(kept(lost, lost), 2, POLICY) == "", "a lost node says nothing of the step"
    assert "failed twice" in why_end(kept(killed(8), lost, killed(8)), 3, POLICY)
    assert "once" in why_end(kept(killed(8)), 0, Failures(same_step=1))


def test_what_does_not_count_is_not_counted() -> None:
    helped, away = replace(killed(1), helped=True), replace(killed(1), kind="taken away")
    assert kept(helped, away, None) == {}


def test_a_node_is_left_out_after_two_failures_of_this_start() -> None:
    failures = kept(killed(1, "a"), killed(2, "b"), killed(3, "a"), killed(4, None), killed(5, None))
    assert nodes_to_leave_out(failures, since=0) == {"a": "rank 1 failed at 3"}
    assert nodes_to_leave_out(failures, since=1) == {}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 4), st.integers(1, 4), st.integers(0, 12))
def test_a_run_never_goes_on_for_ever_without_a_checkpoint(
    steps: list[int], most: int, same: int, saved_by: int
) -> None:
    policy = Failures(max=most, same_step=same)
    failures = kept(*map(killed, steps))
    if spent(failures, saved_by) > most or steps[-same:] == [steps[-1]] * same:
        assert why_end(failures, saved_by, policy)
    else:
        assert why_end(failures, saved_by, policy) == ""


@pytest.mark.parametrize("failure", [killed(3), replace(killed(2), helped=True, rank=None, node=None)])
def test_a_failure_is_read_back_as_it_was_kept(failure: Failure) -> None:
    assert Failure.of({"failure": failure.to_json()}) == failure
    assert Failure.of({"state": "lost"}) is None


def test_a_broken_node_is_left_out_before_the_step_is_accused() -> None:
    policy = Failures(max=5, same_step=2)
    broken = kept(killed(1, "b"), killed(1, "b"))
    assert why_end(broken, 0, policy, {"b"}) == ""
    assert "step 1 failed twice" in why_end(broken, 0, policy), "the run cannot do without that node"
    assert "step 1 failed twice" in why_end(kept(killed(1, "a"), killed(1, "b")), 0, policy, {"b"})
    assert "step 1 failed 3 times" in why_end(kept(killed(1, "b"), killed(1, "b"), killed(1, "c")), 0, policy, {"b"})
    assert "All restarts" in why_end(broken, 0, Failures(max=1, same_step=2), {"b"}), "the budget holds all the same"


def test_what_fails_before_any_step_says_nothing_of_one() -> None:
    early = [replace(killed(101, node), starting=True) for node in "ab"]
    assert why_end(kept(*early), 0, POLICY) == ""
    assert why_end(kept(killed(101), early[0]), 0, POLICY) == ""
    assert "failed twice" in why_end(kept(killed(101), early[0], killed(101)), 0, POLICY)
    assert "All restarts" in why_end(kept(*early, *early), 0, POLICY)
