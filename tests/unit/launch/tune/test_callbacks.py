"""What Ray Tune asks of a search, asked as Tune does but without a cluster: schedulers, budgets, failures, deaths."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.tune.callbacks import EventLogCallback, EventLogSearcher, RungScheduler
from llm_training_toolkit.launch.tune.trainable import wait_for_metrics
from llm_training_toolkit.search.budget import SearchBudget
from llm_training_toolkit.search.early_stopping import compute_rung_steps, get_bracket
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.optuna_sampler import propose_optuna_point
from llm_training_toolkit.search.results import find_best_trial
from llm_training_toolkit.search.sampler import TrialSampler
from unit.search.test_space import RATE, search, trials

pytestmark = pytest.mark.slow  # for the import of Ray Tune
STEPS, TOKENS = 64, 100
"""Of a trial, and of a step."""


def value(trial: TrialRecord, step: int) -> float:
    """The loss of a trial at a step: a bowl around 0.005, that all sink into."""
    return (math.log10(trial.parameters["optim.lr"]) + 2.3) ** 2 + 4.0 / step


class Begun:
    """A trial at work, as its driver would tell of it."""

    def __init__(self, asked: SearchConfig, trial: TrialRecord) -> None:
        self.trial, self._steps = trial, compute_rung_steps(asked.scheduler, STEPS, TOKENS)
        self._bracket = get_bracket(asked.scheduler, trial.number, len(self._steps))
        self._rung = self._bracket

    def next(self) -> dict[str, Any]:
        """What it says at its next rung, or at its end."""
        rung, step = self._rung, self._steps[self._rung]
        self._rung += 1
        last = rung == len(self._steps) - 1
        kind = {"kind": "end", "state": "finished"} if last else {"kind": "rung"}
        at = {"rung": rung, "bracket": self._bracket, "step": step, "tokens": step * TOKENS}
        return {"trial": self.trial.number, "value": value(self.trial, step), **at, **kind}


def work(asked: SearchConfig, path: Path, at_once: int = 4, events: int | None = None) -> EventLog:
    """Carry a search out as Tune does, or resume it; `events` in, the driver dies."""
    event_log = EventLog(path / "events.jsonl")
    event_log.record_start()
    state = SearchBudget(asked, event_log)
    learner = propose_optuna_point if asked.searcher.name == "optuna" else None
    source = EventLogSearcher(
        state, TrialSampler(trials(asked, path), event_log, learner), lambda trial: {"number": trial.number}
    )
    gate, at_work, more = RungScheduler(state), list[Begun](), True
    while more or at_work:
        if events == 0:
            break
        events = events and events - 1
        order = source.suggest("") if more and len(at_work) < at_once else "wait"
        if isinstance(order, dict):
            at_work.append(Begun(asked, event_log.trials[order["number"]]))
            continue
        more = more and order != EventLogSearcher.FINISHED
        if not at_work:
            continue
        one = at_work.pop(0)
        said = one.next()
        if said["kind"] == "end":
            gate.on_trial_complete(None, None, said)
        elif gate.on_trial_result(None, None, said) == RungScheduler.CONTINUE:
            at_work.append(one)
    return EventLog(path / "events.jsonl")


def tokens(event_log: EventLog) -> int:
    return sum(trial.last_rung.tokens for trial in event_log.trials.values() if trial.last_rung)


@pytest.mark.parametrize(("scheduler", "share"), [("fifo", 1.0), ("asha", 0.4), ("median", 0.8), ("hyperband", 0.75)])
def test_each_scheduler_keeps_the_best_and_saves_what_it_can(scheduler: str, share: float, tmp_path: Path) -> None:
    asked = search(RATE, trials=16, scheduler={"name": scheduler})
    event_log = work(asked, tmp_path)
    assert len(event_log.trials) == 16
    assert {trial.state for trial in event_log.trials.values()} <= {"finished", "stopped"}
    found = find_best_trial(event_log, "min")
    assert found is not None
    assert found.state == "finished"
    whole = work(search(RATE, trials=16, scheduler={"name": "fifo"}), tmp_path / "whole")
    assert found.number == min(whole.trials.values(), key=lambda trial: value(trial, STEPS)).number
    assert tokens(event_log) <= share * tokens(whole)
    if scheduler == "hyperband":
        assert {rung.bracket for _, rung in event_log.passed_rungs} == {0, 1, 2}


@pytest.mark.parametrize("searcher", ["random", "optuna"])
def test_a_driver_that_dies_anywhere_changes_no_decision(searcher: str, tmp_path: Path) -> None:
    asked = search(RATE, trials=9, searcher={"name": searcher, "n_startup_trials": 3})
    for death in range(1, 24, 2):
        path = tmp_path / str(death)
        before = work(asked, path, at_once=1, events=death)
        ended = {number: trial for number, trial in before.trials.items() if trial.state != "begun"}
        after = work(asked, path, at_once=1)
        assert {number: after.trials[number] for number in ended} == ended  # none is repeated
        assert [trial.parameters for trial in before.trials.values()] == [
            after.trials[number].parameters for number in before.trials
        ]
        assert len(after.trials) == 9
        assert after.unfinished_trials == []


def test_a_budget_in_tokens_ends_optunas_search_at_the_next_rungs(tmp_path: Path) -> None:
    budget = 3 * STEPS * TOKENS
    asked = search(RATE, trials=None, budget={"tokens": budget}, searcher={"name": "optuna", "n_startup_trials": 4})
    event_log = work(asked, tmp_path)
    assert budget <= tokens(event_log) < budget + 4 * STEPS * TOKENS
    assert event_log.unfinished_trials == []
    assert len(event_log.trials) > 4
    assert SearchBudget(asked, event_log).is_search_finished


def test_a_budget_in_time_lets_nothing_begin_once_it_is_over(tmp_path: Path) -> None:
    asked = search(RATE, trials=None, budget={"time": "1s"})
    (tmp_path / "events.jsonl").write_text('{"time": 10, "event": "start"}\n{"time": 12, "event": "beat"}\n')
    assert work(asked, tmp_path).trials == {}


def test_failures_are_counted_and_the_last_one_is_written_down(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    event_log.record_begin(TrialRecord(0, {"optim.lr": 0.01}, 0))
    (tmp_path / "error.txt").write_text("Traceback\n  somewhere\nLaunchError: node 10.0.0.1 was lost\n\n")
    told = SimpleNamespace(config={"number": 0, "run": str(tmp_path)}, error_file=str(tmp_path / "error.txt"))
    watcher = EventLogCallback(SearchBudget(search(RATE), event_log), lambda: None)
    watcher.on_trial_recover(0, [], told)
    assert (event_log.trials[0].state, event_log.trials[0].failures) == ("begun", 1)
    row = {"perf/tokens_per_second": 50.0, "perf/step_seconds": 2.0}
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    watcher.on_trial_error(0, [], told)
    known = EventLog(tmp_path / "events.jsonl").trials[0]
    assert (known.state, known.error) == ("failed", "LaunchError: node 10.0.0.1 was lost")
    assert known.trained_tokens == 300


def test_a_run_that_fails_by_itself_says_what_it_had_trained(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    event_log.record_begin(TrialRecord(0, {"optim.lr": 0.01}, 0))
    asked = search(RATE, trials=None, budget={"tokens": 500})
    said = {"trial": 0, "kind": "end", "state": "failed", "error": "the loss is nan", "trained": 500}
    RungScheduler(SearchBudget(asked, event_log)).on_trial_complete(None, None, said)
    assert SearchBudget(asked, EventLog(tmp_path / "events.jsonl")).is_exhausted


def test_a_line_that_comes_late_from_another_node_is_waited_for(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 4, "train/tokens": 400}\n')
    late = threading.Timer(0.5, lambda: metrics.write_text('{"step": 4, "eval/loss": 3.0, "train/tokens": 400}\n'))
    late.start()
    assert wait_for_metrics(metrics, 4, "eval/loss", within=30)["eval/loss"] == 3.0
    with pytest.raises(LaunchError, match=r"eval/loss after step 8 was not in .* within 0\.1 s"):
        wait_for_metrics(metrics, 8, "eval/loss", within=0.1)
