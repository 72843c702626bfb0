"""What a search remembers, and what it makes of it."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.search.event_log import EventLog, RungResult, TrialRecord
from llm_training_toolkit.search.results import (
    compute_best_so_far,
    find_best_trial,
    find_comparable_values,
    get_trial_tokens,
    rank_trials,
)
from unit.search.test_space import CHOICES, RATE, search


def filled(path: Path) -> EventLog:
    """Two trials to the end, one stopped, one failed, one that had begun."""
    event_log = EventLog(path)
    event_log.record_start()
    for number, (lr, values) in enumerate(
        [(1e-3, [3.0, 2.5]), (3e-3, [2.8, 2.0]), (1e-1, [5.0]), (1e-2, []), (2e-3, [])]
    ):
        event_log.record_begin(TrialRecord(number, {"optim.lr": lr}, number))
        for rung, value in enumerate(values):
            last = rung == 1
            event_log.record_rung(
                number, RungResult(rung, 4 if not last else 16, 400 if not last else 1600, value, not last, last=last)
            )
    event_log.record_end(0, "finished")
    event_log.record_end(1, "finished")
    event_log.record_end(2, "stopped")
    event_log.record_end(3, "failed", "the loss is nan")
    return event_log


def test_the_file_holds_all_of_the_event_log(tmp_path: Path) -> None:
    written = filled(tmp_path / "events.jsonl")
    read = EventLog(tmp_path / "events.jsonl")
    assert read.trials == written.trials
    assert read.passed_rungs == written.passed_rungs
    assert [trial.number for trial in read.unfinished_trials] == [4]
    assert read.next_draw == 5


def test_half_a_line_of_a_killed_driver_does_no_harm(tmp_path: Path) -> None:
    filled(tmp_path / "events.jsonl")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"event": "end", "trial": 4, "sta')
    event_log = EventLog(tmp_path / "events.jsonl")
    event_log.record_end(4, "stopped")
    assert EventLog(tmp_path / "events.jsonl").unfinished_trials == []


def test_a_decision_without_its_end_is_made_up_for(tmp_path: Path) -> None:
    event_log = filled(tmp_path / "events.jsonl")
    event_log.record_rung(4, RungResult(0, 4, 400, 9.0, promoted=False))
    EventLog(tmp_path / "events.jsonl").record_start()
    assert EventLog(tmp_path / "events.jsonl").trials[4].state == "stopped"


def test_making_up_for_an_end_does_not_count_the_time_when_nobody_worked(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 10, "event": "start"}\n{"time": 12, "event": "begin", "trial": 0, ')
    with path.open("a") as file:
        file.write('"parameters": {}, "draw": 0}\n')
        facts = {"trial": 0, "rung": 0, "step": 4, "tokens": 400, "value": 9.0, "bracket": 0, "last": False}
        file.write(json.dumps({"time": 15, "event": "rung", **facts, "promoted": False}) + "\n")
    event_log = EventLog(path)
    event_log.record_start()
    assert event_log.trials[0].state == "stopped"
    assert 5 <= event_log.compute_active_seconds() < 10


def test_an_event_log_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "event": "begin", "trial": 0, "parameters": {}, "draw": 0}\n')
    with path.open("a") as file:
        file.write('{"time": 2, "event": "rung", "trial": 0, "rung": 0, "go_on": false}\n')
    with pytest.raises(CheckpointError, match="earlier version"):
        EventLog(path)


def test_an_event_log_that_cannot_be_written_says_so_and_takes_nothing(tmp_path: Path) -> None:
    event_log = filled(tmp_path / "events.jsonl")
    (tmp_path / "events.jsonl").unlink()
    (tmp_path / "events.jsonl").symlink_to("/dev/full")  # every write: no space left on device
    with pytest.raises(LaunchError, match=r"events\.jsonl cannot be written .*No space left"):
        event_log.record_end(4, "stopped")
    assert "No space left" in event_log.write_error
    assert event_log.trials[4].state == "begun"


def test_what_a_failed_trial_has_trained_counts_beyond_its_last_rung(tmp_path: Path) -> None:
    event_log = filled(tmp_path / "events.jsonl")
    event_log.record_rung(4, RungResult(0, 4, 400, 3.0, promoted=True))
    event_log.record_end(4, "failed", "the loss is nan", trained=700)
    assert get_trial_tokens(EventLog(tmp_path / "events.jsonl").trials[4]) == 700
    assert get_trial_tokens(event_log.trials[0]) == 1600


def test_the_best_is_the_best_of_those_that_came_furthest(tmp_path: Path) -> None:
    event_log = filled(tmp_path / "events.jsonl")
    assert [trial.number for trial in rank_trials(event_log, "min")] == [1, 0, 2, 4, 3]
    winner = find_best_trial(event_log, "max")
    assert winner is not None
    assert winner.number == 0


def test_ends_are_compared_with_ends_whatever_rungs_came_before_them(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    for number, (rung, value) in enumerate([(2, 1.0), (3, 2.0)]):  # the larger batch has a rung more
        event_log.record_begin(TrialRecord(number, {"train.global_batch_size": 8 * 4**number}, number))
        event_log.record_rung(number, RungResult(rung, 10, 100, value, promoted=False, last=True))
        event_log.record_end(number, "finished")
    assert [trial.number for trial in rank_trials(event_log, "min")] == [0, 1]
    assert event_log.get_rung_values(2, 0, excluding=1) == [], "an end is no rung of others"


def test_best_so_far_counts_the_tokens_of_all(tmp_path: Path) -> None:
    assert compute_best_so_far(filled(tmp_path / "events.jsonl"), "min") == [
        (400, 3.0),
        (1600, 2.5),
        (3200, 2.0),
        (3600, 2.0),
    ]


def test_values_are_compared_at_the_rung_most_trials_reached(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    for number, values in enumerate([[3.0], [math.nan], [2.0, 1.0]]):
        event_log.record_begin(TrialRecord(number, {}, number))
        for rung, value in enumerate(values):
            event_log.record_rung(number, RungResult(rung, 4, 400, value, promoted=False))
    found = {mode: [value for _, value in find_comparable_values(event_log, mode)] for mode in ("min", "max")}
    assert found == {"min": [3.0, 3.0, 2.0], "max": [3.0, 2.0, 2.0]}


@pytest.mark.slow
def test_optuna_learns_from_the_event_log_alone_and_repeats(tmp_path: Path) -> None:
    from llm_training_toolkit.search.optuna_sampler import propose_optuna_point

    asked = search(RATE | CHOICES, searcher={"name": "optuna", "n_startup_trials": 6})
    path = tmp_path / "events.jsonl"
    for number in range(40):
        event_log = EventLog(path)
        point = propose_optuna_point(asked, event_log, number)
        assert all(asked.search[key].contains_value(value) for key, value in point.items())
        assert point == propose_optuna_point(asked, EventLog(path), number)
        event_log.record_begin(TrialRecord(number, point, number))
        value = (math.log10(point["optim.lr"]) + 2.0) ** 2 + (point["optim.lr_scheduler"] != "wsd")
        promoted = value < 1.0
        event_log.record_rung(number, RungResult(0, 4, 400, value, promoted=promoted))
        if promoted:
            event_log.record_rung(number, RungResult(1, 16, 1600, value, promoted=False, last=True))
        event_log.record_end(number, "finished" if promoted else "stopped")
    values = [trial.rungs[0].value for trial in EventLog(path).trials.values()]
    assert statistics.mean(values[20:]) < 0.7 * statistics.mean(values[:8])
    winner = find_best_trial(EventLog(path), "min")
    assert winner is not None
    assert winner.last_rung is not None
    assert winner.last_rung.value < 0.05
