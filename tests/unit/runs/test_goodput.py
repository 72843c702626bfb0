"""Where the time goes: every second is put down once, over attempts, commands and failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.runs.attempts import begin_attempt, end_attempt, update_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import (
    GOODPUT_CATEGORIES,
    GoodputCategory,
    GoodputState,
    GoodputTracker,
    format_goodput,
    load_goodput_state,
    read_seconds_by_category,
)
from llm_training_toolkit.runs.status import read_goodput

Moves = st.lists(st.tuples(st.sampled_from(GOODPUT_CATEGORIES), st.floats(0.0, 1e4)), max_size=30)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@given(Moves, st.floats(0.0, 1e4))
def test_the_parts_add_up_to_the_time_that_passed(moves: list[tuple[GoodputCategory, float]], before: float) -> None:
    clock = Clock(1000.0)
    account = GoodputTracker(900.0, {"idle": before}, 0, clock)
    for part, seconds in moves:
        account.enter_category(part)
        clock.now += seconds
    split = read_seconds_by_category(account.compute_metrics())
    assert sum(split.values()) == pytest.approx(before + clock.now - 900.0, abs=0.01)
    assert split["startup"] >= 100.0
    for part in GOODPUT_CATEGORIES[1:]:
        wanted = sum(seconds for each, seconds in moves if each == part) + (before if part == "idle" else 0.0)
        assert split[part] == pytest.approx(wanted, abs=0.01)


def test_steps_done_again_are_recomputation() -> None:
    clock = Clock(0.0)
    account = GoodputTracker(0.0, {}, 7, clock)
    for step in (6, 7, 8, 9):
        account.enter_step(step)
        clock.now += 1.0
    values = account.compute_metrics()
    assert (values["goodput/recomputation_seconds"], values["goodput/step_seconds"]) == (2.0, 2.0)
    assert values["goodput/fraction"] == 0.5
    assert format_goodput(read_seconds_by_category(values)).startswith(
        "goodput 50% of 4 s: startup 0.0 s, data 0.0 s, step 2.0 s"
    )


def test_a_clock_that_was_set_back_takes_nothing_away() -> None:
    clock = Clock(100.0)
    account = GoodputTracker(90.0, {}, 0, clock)
    clock.now = 50.0
    assert sum(read_seconds_by_category(account.compute_metrics()).values()) == 0.0


@pytest.mark.parametrize("set_by", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_while_the_run_works_moves_nothing(monkeypatch: pytest.MonkeyPatch, set_by: float) -> None:
    account, now = GoodputTracker(time.time(), {}, 0), time.time
    account.enter_category("step")
    monkeypatch.setattr(time, "time", lambda: now() + set_by)
    time.sleep(0.02)
    split = read_seconds_by_category(account.compute_metrics())
    assert 0.02 <= split["step"] < 10
    assert sum(split.values()) < 10


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def attempt(run: RunDirectory, began: float, steps: range, until: float, state: str) -> None:
    """An attempt whose last row was written at `until`."""
    found = load_goodput_state(run, began)
    number = begin_attempt(run, {"began": began, "reached": found.last_completed_step})
    clock = Clock(until)
    account = GoodputTracker(began, found.seconds_by_category, found.last_completed_step, clock)
    with run.metrics_path.open("a") as file:
        for step in steps:
            row = {"step": step, "attempt": number, "time": until, "train/loss": 1.0, **account.compute_metrics()}
            file.write(json.dumps(row) + "\n")
    end_attempt(run, number, state)


def test_what_a_failure_costs_is_idle_and_what_a_person_waits_is_not(run: RunDirectory) -> None:
    assert load_goodput_state(run, 5.0) == GoodputState({}, 0)
    attempt(run, 100.0, range(1, 6), 150.0, "failed")
    assert load_goodput_state(run, 170.0).seconds_by_category["idle"] == 20.0
    attempt(run, 170.0, range(3, 5), 200.0, "stopped")
    later = load_goodput_state(run, 9_000.0)
    assert later.seconds_by_category["idle"] == 20.0
    assert sum(later.seconds_by_category.values()) == pytest.approx(100.0)
    assert later.last_completed_step == 5, "also where the newest attempt did not come as far"


def test_an_attempt_that_never_took_a_step_is_idle_time(run: RunDirectory) -> None:
    attempt(run, 100.0, range(0), 100.0, "lost")
    assert load_goodput_state(run, 130.0).seconds_by_category == {"idle": 30.0}
    attempt(run, 130.0, range(0), 130.0, "lost")
    assert load_goodput_state(run, 160.0).seconds_by_category == {"idle": 60.0}


def test_a_command_counts_to_its_end_and_the_time_until_the_next_one_does_not(run: RunDirectory) -> None:
    attempt(run, 100.0, range(1, 6), 150.0, "stopped")
    update_attempt(run, 1, command_ended=153.0)
    assert read_goodput(run)["idle"] == 3.0
    assert load_goodput_state(run, 9_000.0).seconds_by_category["idle"] == 3.0
    attempt(run, 9_000.0, range(6, 8), 9_010.0, "finished")
    assert sum(read_goodput(run).values()) == pytest.approx(63.0)


def test_a_process_that_becomes_another_one_of_its_command_counts_its_time_once(run: RunDirectory) -> None:
    attempt(run, 100.0, range(1, 6), 150.0, "failed")
    account = load_goodput_state(run, 100.0).start_tracker(100.0)
    assert sum(read_seconds_by_category(account.compute_metrics()).values()) == pytest.approx(
        time.time() - 100.0, abs=10.0
    )


def test_a_command_begins_when_its_process_is_started() -> None:
    code = "from llm_training_toolkit.runs.goodput import get_process_start_time; print(get_process_start_time())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert -0.02 < float(done.stdout) - before < 0.5
