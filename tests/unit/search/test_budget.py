"""When a search has nothing left to begin."""

from __future__ import annotations

import time
from pathlib import Path

from llm_training_toolkit.search.budget import SearchBudget
from llm_training_toolkit.search.event_log import EventLog, RungResult, TrialRecord
from unit.search.test_space import CHOICES, RATE, search


def begun(event_log: EventLog, count: int, tokens: int = 100) -> None:
    for number in range(count):
        event_log.record_begin(TrialRecord(number, {"optim.lr": 0.001 + number}, number))
        event_log.record_rung(number, RungResult(0, 4, tokens, 1.0, promoted=False))
        event_log.record_end(number, "stopped")


def test_the_number_of_trials_is_an_end_that_can_be_put_off(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 4)
    assert SearchBudget(search(RATE, trials=4), event_log).is_search_finished
    assert not SearchBudget(search(RATE, trials=5), event_log).is_search_finished


def test_a_trial_at_work_is_no_end(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 3)
    event_log.record_begin(TrialRecord(3, {"optim.lr": 0.5}, 3))
    assert not SearchBudget(search(RATE, trials=4), event_log).is_search_finished


def test_a_grid_ends_with_its_combinations_those_left_out_included(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 5)
    grid = search(CHOICES, trials=100, searcher={"name": "grid"})
    assert not SearchBudget(grid, event_log).is_search_finished
    event_log.record_invalid_point(5, {"optim.lr": 99}, "impossible")
    assert SearchBudget(grid, event_log).is_search_finished


def test_a_point_that_is_left_out_twice_is_one_point(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 4)
    for draw in (5, 9):
        event_log.record_invalid_point(draw, {"optim.lr": 99}, "impossible")
    assert event_log.next_draw == 10
    assert not SearchBudget(search(CHOICES, trials=100), event_log).is_search_finished


def test_failures_in_a_row_before_any_rung_are_without_hope_until_the_next_start(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 1)
    state = SearchBudget(search(RATE, trials=None, budget={"tokens": 1e9}), event_log)
    for number in range(1, 9):
        assert not state.repeated_error
        event_log.record_begin(TrialRecord(number, {"optim.lr": 0.001}, number))
        event_log.record_end(number, "failed", f"error {number}")
    assert state.repeated_error == "error 8"
    assert not SearchBudget(state.search, event_log).repeated_error


def test_tokens_of_all_trials_use_up_the_budget(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    begun(event_log, 3, tokens=500)
    assert SearchBudget(search(RATE, trials=None, budget={"tokens": 1500}), event_log).is_exhausted
    assert not SearchBudget(search(RATE, trials=None, budget={"tokens": 1501}), event_log).is_exhausted


def test_time_counts_while_a_driver_works_and_not_between(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    now = time.time()
    events = [(now - 1000, "start"), (now - 900, "beat"), (now - 30, "start")]
    path.write_text("".join(f'{{"time": {when}, "event": "{what}"}}\n' for when, what in events))
    assert abs(EventLog(path).compute_active_seconds() - 130) < 5
    assert SearchBudget(search(RATE, trials=None, budget={"time": "2m"}), EventLog(path)).is_exhausted
    assert not SearchBudget(search(RATE, trials=None, budget={"time": "3m"}), EventLog(path)).is_exhausted
