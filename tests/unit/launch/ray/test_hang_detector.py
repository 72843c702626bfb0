"""A hang is told from work that takes its time, and the rank that holds up the others is found."""

from __future__ import annotations

import faulthandler
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.distributed import heartbeat
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT, STEP_TIMEOUT_FACTOR, Heartbeat, HeartbeatSnapshot
from llm_training_toolkit.launch.ray.hang_detector import (
    HangDetector,
    find_collective_call,
    find_current_call,
    get_log_size,
)

HANG, EVERY = 60.0, 2.0


def beat(marks: int, patience: float = STEP_TIMEOUT_FACTOR, *, done: bool = False) -> tuple[HeartbeatSnapshot, float]:
    return HeartbeatSnapshot(marks, f"place {marks}", patience, done), 0.0


def watch(size: int = 3) -> HangDetector:
    return HangDetector(size, HANG, EVERY)


def test_the_rank_with_the_fewest_marks_is_behind() -> None:
    seen = watch()
    seen.observe_heartbeats({0: beat(7), 1: beat(6), 2: beat(7)}, 100.0)
    assert seen.find_hang(100.0 + HANG) is None
    hang = seen.find_hang(101.0 + HANG)
    assert hang is not None
    assert (dict(hang.blocking_ranks), hang.is_silent, hang.seconds) == ({1: "place 6"}, False, HANG + 1)


def test_a_rank_that_falls_silent_is_behind_wherever_it_was_last() -> None:
    seen = watch()
    seen.observe_heartbeats({0: beat(7), 1: beat(8, 3.0), 2: beat(7)}, 0.0)
    seen.observe_heartbeats({0: beat(7), 1: (beat(8, 3.0)[0], HANG), 2: beat(7)}, HANG + 1)
    hang = seen.find_hang(HANG + 1)
    assert hang is not None, "what the silent rank did last grants no patience"
    assert (list(hang.blocking_ranks), hang.is_silent) == ([1], True)


def test_any_advance_of_any_rank_starts_the_wait_anew() -> None:
    seen = watch()
    for now in range(0, 1000, 50):
        seen.observe_heartbeats({0: beat(7), 1: beat(now), 2: beat(7)}, float(now))
        assert seen.find_hang(float(now)) is None


def test_building_saving_and_evaluating_may_take_longer_and_an_export_any_time() -> None:
    seen = watch(2)
    seen.observe_heartbeats({0: beat(7, 3.0), 1: beat(7, 3.0)}, 0.0)
    assert seen.find_hang(3 * HANG) is None
    assert seen.find_hang(3 * HANG + 1) is not None
    seen.observe_heartbeats({0: beat(8, NO_TIMEOUT), 1: beat(8, NO_TIMEOUT, done=True)}, 200.0)
    assert seen.find_hang(1e9) is None


def test_a_rank_that_never_starts_holds_up_the_others() -> None:
    seen = watch(2)
    assert seen.find_hang(1e6) is None, "nobody has started: that is not for the watch"
    seen.observe_heartbeats({0: beat(3, 3.0)}, 0.0)
    hang = seen.find_hang(3 * HANG + 1)
    assert hang is not None
    assert dict(hang.blocking_ranks) == {1: "starting its process"}


def test_where_all_wait_for_each_other_all_are_named() -> None:
    seen = watch(2)
    seen.observe_heartbeats({0: beat(5), 1: beat(5)}, 0.0)
    hang = seen.find_hang(HANG + 1)
    assert hang is not None
    assert list(hang.blocking_ranks) == [0, 1]


@given(st.integers(2, 8), st.data())
def test_exactly_the_stragglers_are_named(size: int, data: st.DataObject) -> None:
    late = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    seen = watch(size)
    seen.observe_heartbeats({rank: beat(4 if rank in late else 5) for rank in range(size)}, 0.0)
    hang = seen.find_hang(HANG + 1)
    assert hang is not None
    assert set(hang.blocking_ranks) == late


def test_a_pulse_advances_with_every_mark() -> None:
    own = Heartbeat()
    first = own.get_snapshot()
    own.set_phase("step 1", STEP_TIMEOUT_FACTOR)
    own.set_phase("step 1", STEP_TIMEOUT_FACTOR)
    assert own.get_snapshot().phase_count == first.phase_count + 2
    own.mark_done()
    assert own.get_snapshot().done


def test_where_a_rank_stands_is_read_from_the_stacks_in_its_log(tmp_path: Path) -> None:
    log, own = tmp_path / "rank_0.log", Path(heartbeat.__file__).parent
    log.write_text("noise\n")
    before = get_log_size(log)
    assert find_current_call(log, before) == ""
    with log.open("a") as file:
        faulthandler.dump_traceback(file, all_threads=True)  # of this process: no worker's thread is among them
    assert find_current_call(log, before) == ""
    with log.open("a") as file:
        file.write(
            "Thread 0x00007fe7 (most recent call first):\n"
            '  File "/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce\n'
            f'  File "{own}/engine/engine.py", line 80 in accumulate\n'
            f'  File "{own}/launch/ray_worker.py", line 39 in worker_main\n'
            "\nCurrent thread 0x00007fe8 (most recent call first):\n"
            '  File "/site-packages/ray/_private/worker.py", line 1069 in main_loop\n'
        )
    assert (
        find_current_call(log, before) == "all_reduce (distributed_c10d.py:3252), called by accumulate (engine.py:80)"
    )


def test_an_exchange_is_found_below_what_waits_for_it_and_none_where_there_is_none(tmp_path: Path) -> None:
    log, own = tmp_path / "rank_0.log", Path(heartbeat.__file__).parent
    thread = (
        '  File "/site-packages/torch/nn/modules/linear.py", line 1 in forward\n'
        "{exchange}"
        f'  File "{own}/engine/engine.py", line 80 in accumulate\n'
        f'  File "{own}/launch/ray_worker.py", line 39 in worker_main\n'
    )
    log.write_text("Thread 0x1 (most recent call first):\n" + thread.format(exchange=""))
    assert find_collective_call(log, 0) == ""
    assert find_current_call(log, 0) == "forward (linear.py:1), called by accumulate (engine.py:80)"
    exchange = '  File "/site-packages/torch/distributed/distributed_c10d.py", line 7 in barrier\n'
    log.write_text("Thread 0x1 (most recent call first):\n" + thread.format(exchange=exchange))
    assert find_collective_call(log, 0) == "barrier (distributed_c10d.py:7), called by accumulate (engine.py:80)"


def test_it_is_known_whether_a_rank_has_come_to_a_step_and_pieces_are_no_marks() -> None:
    seen, own = HangDetector(1, 10.0, 2.0), Heartbeat()
    own.set_phase("building the model", 1.0)
    seen.observe_heartbeats({0: (own.get_snapshot(), 0.0)}, 0.0)
    for now in (8.0, 16.0):
        before = own.get_snapshot().phase_count
        own.keepalive(f"building the model, {now}")
        assert own.get_snapshot().phase_count == before
        seen.observe_heartbeats({0: (own.get_snapshot(), 0.0)}, now)
        assert seen.find_hang(now) is None
    assert seen.find_hang(27.0) is not None
    assert not seen.has_stepped
    own.set_phase("step 1, reading its sequences")
    seen.observe_heartbeats({0: (own.get_snapshot(), 0.0)}, 27.0)
    own.set_phase("saving")
    seen.observe_heartbeats({0: (own.get_snapshot(), 0.0)}, 28.0)
    assert seen.has_stepped
