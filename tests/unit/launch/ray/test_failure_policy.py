"""What counts as the cause of a failure, and when no new workers may start: decided from what was seen and kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config.schema import FailuresConfig
from llm_training_toolkit.distributed.events import WorkerErrorEvent, WorkerStartedEvent
from llm_training_toolkit.launch.ray.failure_policy import (
    AttemptFailure,
    FailureEvidence,
    diagnose_failure,
    failure_count,
    find_abort_reason,
    find_counted_failures,
    find_excluded_nodes,
    find_restart_pause,
)

WORKERS = {
    rank: WorkerStartedEvent(rank, f"id{rank // 2}", f"10.0.0.{rank // 2}", 100 + rank, 1.0, f"a{rank}", "p")
    for rank in range(4)
}
CLOSED = WorkerErrorEvent(
    0, "step 3", "RuntimeError", "RuntimeError: Connection closed by peer", final=False, helped=False
)
MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.1, ID: abc) where the task was running was 6.25GB / 7.00GB (0.89). Refer to the manual"""


def get_abort_reason(*evidence: Any) -> str:
    """Return the reason to end a run that may not restart."""
    reason = find_abort_reason(*evidence)
    assert reason is not None
    return reason


def killed(step: int, node: str | None = "10.0.0.1") -> AttemptFailure:
    return AttemptFailure("killed", f"rank 1 failed at {step}", step, 1, node)


def kept(*failures: AttemptFailure | None) -> dict[int, AttemptFailure]:
    """As if each was read back from its attempt."""
    records: dict[int, dict[str, Any]] = {
        number: {"failure": failure.to_json()} if failure else {} for number, failure in enumerate(failures, start=1)
    }
    return find_counted_failures(records)


def test_connections_that_the_others_lost_are_not_the_cause() -> None:
    dead = diagnose_failure(FailureEvidence(WORKERS, [CLOSED], deaths={2: ("killed", "End of file")}), 7)
    assert (dead.kind, dead.rank, dead.node, dead.step) == ("killed", 2, "10.0.0.1", 7)
    assert "rank 2 failed: its process 102 on node 10.0.0.1" in dead.cause
    lost = diagnose_failure(
        FailureEvidence(WORKERS, [CLOSED], deaths={2: ("killed", "")}, lost_nodes=frozenset({"id1"})), 7
    )
    assert (lost.kind, lost.node) == ("node_lost", "10.0.0.1")
    assert lost.cause == "node 10.0.0.1 with ranks 2, 3 is lost"
    told = diagnose_failure(FailureEvidence(WORKERS, [replace(CLOSED, rank=3, text="ValueError: bad"), CLOSED]), 7)
    assert (told.kind, told.rank, told.cause) == ("raised", 3, "rank 3 failed: ValueError: bad")


def test_failures_without_a_step_are_answered_with_growing_pauses() -> None:
    starting = replace(killed(1), starting=True)
    pauses = [find_restart_pause(kept(killed(9), *[starting] * count)) for count in range(5)]
    assert pauses == [0, 5, 15, 60, 60]
    assert find_restart_pause(kept(starting, starting, killed(9))) == 0, "it had stepped in between"


def test_memory_is_named_with_its_numbers_before_other_deaths() -> None:
    found = diagnose_failure(FailureEvidence(WORKERS, [CLOSED], deaths={0: ("killed", ""), 3: ("oom", MEMORY)}), 1)
    assert (found.kind, found.rank) == ("oom", 3)
    assert "the memory of node 10.0.0.1 ran out" in found.cause
    assert "6.25GB / 7.00GB" in found.cause
    helper = diagnose_failure(FailureEvidence(WORKERS, out_of_memory_error=MEMORY), 1)
    assert helper.kind == "oom"
    assert "driver's node" in helper.cause


def test_a_hang_a_remedy_and_an_announced_end_come_first() -> None:
    everything = FailureEvidence(WORKERS, [CLOSED], deaths={0: ("killed", "")}, lost_nodes=frozenset({"id0"}))
    hang = diagnose_failure(replace(everything, hang="no rank has advanced", hung_worker=WORKERS[1]), 3)
    assert (hang.kind, hang.rank, hang.node, hang.is_counted) == ("hang", 1, "10.0.0.0", True)
    helped = diagnose_failure(
        replace(everything, errors=[CLOSED, replace(CLOSED, rank=2, helped=True, text="smaller")]), 3
    )
    assert (helped.cause, helped.is_counted) == ("smaller", False)
    announced = diagnose_failure(replace(everything, draining_nodes=frozenset({"id0"})), 3)
    assert (announced.kind, announced.is_counted) == ("preempted", False)


def test_what_only_ray_knows_is_its_last_line() -> None:
    assert (
        diagnose_failure(FailureEvidence({}, ray_error="a\n\n  no place\n"), 1).cause
        == "the workers did not start: no place"
    )
    assert diagnose_failure(FailureEvidence(WORKERS, ray_error=""), 1).cause == "the workers ended: Ray gives no reason"


POLICY = FailuresConfig(max_failures=2, max_same_step_failures=2)


def test_the_budget_ends_and_a_checkpoint_refills_it() -> None:
    three = kept(killed(3), killed(5), killed(8))
    assert "All restarts (failures.max_failures = 2) are used up" in get_abort_reason(three, 0, POLICY)
    assert find_abort_reason(three, 2, POLICY) is None, (
        "attempt 2 saved, so only its own failure and the next one count"
    )
    assert failure_count(three, 3) == 1
    assert find_abort_reason(kept(killed(3)), 0, FailuresConfig(max_failures=0)) is not None


def test_the_same_step_twice_ends_the_run_whatever_was_saved_in_between() -> None:
    twice = kept(killed(3), killed(8), None, killed(8))
    why = get_abort_reason(twice, 4, POLICY)
    assert why.startswith("step 8 failed twice in a row")
    assert why.endswith("The last time rank 1 failed at 8")
    assert find_abort_reason(kept(killed(8), killed(3), killed(8)), 3, POLICY) is None
    lost = AttemptFailure("node_lost", "node is lost", 8, 1, "10.0.0.1")
    assert find_abort_reason(kept(lost, lost), 2, POLICY) is None, "a lost node says nothing of the step"
    assert "failed twice" in get_abort_reason(kept(killed(8), lost, killed(8)), 3, POLICY)
    assert "once" in get_abort_reason(kept(killed(8)), 0, FailuresConfig(max_same_step_failures=1))


def test_what_does_not_count_is_not_counted() -> None:
    helped, away = replace(killed(1), helped=True), replace(killed(1), kind="preempted")
    assert kept(helped, away, None) == {}


def test_a_node_is_left_out_after_two_failures_of_this_start() -> None:
    failures = kept(killed(1, "a"), killed(2, "b"), killed(3, "a"), killed(4, None), killed(5, None))
    assert find_excluded_nodes(failures, since=0) == {"a": "rank 1 failed at 3"}
    assert find_excluded_nodes(failures, since=1) == {}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.integers(0, 4), st.integers(1, 4), st.integers(0, 12))
def test_a_run_never_restarts_for_ever_without_a_checkpoint(
    steps: list[int], most: int, same: int, saving_attempt: int
) -> None:
    policy = FailuresConfig(max_failures=most, max_same_step_failures=same)
    failures = kept(*map(killed, steps))
    if failure_count(failures, saving_attempt) > most or steps[-same:] == [steps[-1]] * same:
        assert find_abort_reason(failures, saving_attempt, policy)
    else:
        assert find_abort_reason(failures, saving_attempt, policy) is None


@pytest.mark.parametrize("failure", [killed(3), replace(killed(2), helped=True, rank=None, node=None)])
def test_a_failure_is_read_back_as_it_was_kept(failure: AttemptFailure) -> None:
    assert AttemptFailure.from_attempt({"failure": failure.to_json()}) == failure
    assert AttemptFailure.from_attempt({"state": "lost"}) is None


def test_a_broken_node_is_left_out_before_the_step_is_accused() -> None:
    policy = FailuresConfig(max_failures=5, max_same_step_failures=2)
    broken = kept(killed(1, "b"), killed(1, "b"))
    assert find_abort_reason(broken, 0, policy, {"b"}) is None
    assert "step 1 failed twice" in get_abort_reason(broken, 0, policy), "the run cannot do without that node"
    assert "step 1 failed twice" in get_abort_reason(kept(killed(1, "a"), killed(1, "b")), 0, policy, {"b"})
    assert "step 1 failed 3 times" in get_abort_reason(
        kept(killed(1, "b"), killed(1, "b"), killed(1, "c")), 0, policy, {"b"}
    )
    assert "All restarts" in get_abort_reason(
        broken, 0, FailuresConfig(max_failures=1, max_same_step_failures=2), {"b"}
    ), "the budget holds all the same"


def test_what_fails_before_any_step_says_nothing_of_one() -> None:
    early = [replace(killed(101, node), starting=True) for node in "ab"]
    assert find_abort_reason(kept(*early), 0, POLICY) is None
    assert find_abort_reason(kept(killed(101), early[0]), 0, POLICY) is None
    assert "failed twice" in get_abort_reason(kept(killed(101), early[0], killed(101)), 0, POLICY)
    assert "All restarts" in get_abort_reason(kept(*early, *early), 0, POLICY)
