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

from llm_training_toolkit.runs.attempts import begin_attempt, end_attempt, note_in_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import PARTS, Account, Carried, Part, carried, in_words, split_of
from llm_training_toolkit.runs.status import goodput

Moves = st.lists(st.tuples(st.sampled_from(PARTS), st.floats(0.0, 1e4)), max_size=30)


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@given(Moves, st.floats(0.0, 1e4))
def test_the_parts_add_up_to_the_time_that_passed(moves: list[tuple[Part, float]], before: float) -> None:
    clock = Clock(1000.0)
    account = Account(900.0, {"idle": before}, 0, clock)
    for part, seconds in moves:
        account.enter(part)
        clock.now += seconds
    split = split_of(account.values())
    assert sum(split.values()) == pytest.approx(before + clock.now - 900.0, abs=0.01)
    assert split["startup"] >= 100.0
    for part in PARTS[1:]:
        wanted = sum(seconds for each, seconds in moves if each == part) + (before if part == "idle" else 0.0)
        assert split[part] == pytest.approx(wanted, abs=0.01)


def test_steps_done_again_are_recomputation() -> None:
    clock = Clock(0.0)
    account = Account(0.0, {}, 7, clock)
    for step in (6, 7, 8, 9):
        account.enter_step(step)
        clock.now += 1.0
    values = account.values()
    assert (values["goodput/recomputation_seconds"], values["goodput/step_seconds"]) == (2.0, 2.0)
    assert values["goodput/fraction"] == 0.5
    assert in_words(split_of(values)).startswith("goodput 50% of 4 s: startup 0.0 s, data 0.0 s, step 2.0 s")


def test_a_clock_that_was_set_back_takes_nothing_away() -> None:
    clock = Clock(100.0)
    account = Account(90.0, {}, 0, clock)
    clock.now = 50.0
    assert sum(split_of(account.values()).values()) == 0.0


@pytest.mark.parametrize("set_by", [-86_400.0, 86_400.0])
def test_a_clock_that_is_set_while_the_run_works_moves_nothing(monkeypatch: pytest.MonkeyPatch, set_by: float) -> None:
    account, now = Account(time.time(), {}, 0), time.time
    account.enter("step")
    monkeypatch.setattr(time, "time", lambda: now() + set_by)
    time.sleep(0.02)
    split = split_of(account.values())
    assert 0.02 <= split["step"] < 10
    assert sum(split.values()) < 10


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def attempt(run: RunDirectory, began: float, steps: range, until: float, state: str) -> None:
    """An attempt whose last row was written at `until`."""
    found = carried(run, began)
    number = begin_attempt(run, {"began": began, "reached": found.reached})
    clock = Clock(until)
    account = Account(began, found.before, found.reached, clock)
    with run.metrics.open("a") as file:
        for step in steps:
            row = {"step": step, "attempt": number, "time": until, "train/loss": 1.0, **account.values()}
            file.write(json.dumps(row) + "\n")
    end_attempt(run, number, state)


def test_what_a_failure_costs_is_idle_and_what_a_person_waits_is_not(run: RunDirectory) -> None:
    assert carried(run, 5.0) == Carried({}, 0)
    attempt(run, 100.0, range(1, 6), 150.0, "failed")
    assert carried(run, 170.0).before["idle"] == 20.0
    attempt(run, 170.0, range(3, 5), 200.0, "stopped")
    later = carried(run, 9_000.0)
    assert later.before["idle"] == 20.0
    assert sum(later.before.values()) == pytest.approx(100.0)
    assert later.reached == 5, "also where the newest attempt did not come as far"


def test_an_attempt_that_never_took_a_step_is_idle_time(run: RunDirectory) -> None:
    attempt(run, 100.0, range(0), 100.0, "lost")
    assert carried(run, 130.0).before == {"idle": 30.0}
    attempt(run, 130.0, range(0), 130.0, "lost")
    assert carried(run, 160.0).before == {"idle": 60.0}


def test_a_command_counts_to_its_end_and_the_time_until_the_next_one_does_not(run: RunDirectory) -> None:
    attempt(run, 100.0, range(1, 6), 150.0, "stopped")
    note_in_attempt(run, 1, command_ended=153.0)
    assert goodput(run)["idle"] == 3.0
    assert carried(run, 9_000.0).before["idle"] == 3.0
    attempt(run, 9_000.0, range(6, 8), 9_010.0, "finished")
    assert sum(goodput(run).values()) == pytest.approx(63.0)


def test_a_process_that_becomes_another_one_of_its_command_counts_its_time_once(run: RunDirectory) -> None:
    attempt(run, 100.0, range(1, 6), 150.0, "failed")
    account = carried(run, 100.0).open(100.0)
    assert sum(split_of(account.values()).values()) == pytest.approx(time.time() - 100.0, abs=10.0)


def test_a_command_begins_when_its_process_is_started() -> None:
    code = "from llm_training_toolkit.runs.goodput import command_began; print(command_began())"
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert -0.02 < float(done.stdout) - before < 0.5
