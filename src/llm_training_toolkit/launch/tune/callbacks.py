"""What Ray Tune asks of a search, answered from its ledger: the next trial, whether one goes on, what is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.search.budget import SearchBudget
from llm_training_toolkit.search.early_stopping import should_continue
from llm_training_toolkit.search.event_log import RungResult, TrialRecord
from llm_training_toolkit.search.results import read_trained_tokens
from llm_training_toolkit.search.sampler import TrialSampler

_HEARTBEAT_SECONDS = 30.0
"""Seconds of work that a killed driver may leave out of the time that counts."""
TrialSpecBuilder = Callable[[TrialRecord], dict[str, Any]]
"""A trial as the order that its driver gets."""


class _Stateless:
    """A part that Tune writes into its own snapshot, which nobody reads: the ledger has what matters."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class EventLogSearcher(_Stateless, Searcher):
    """Tune's source of trials: first those that had begun, then new ones."""

    def __init__(self, state: SearchBudget, suggestions: TrialSampler, start: TrialSpecBuilder) -> None:
        super().__init__()
        self._state, self._suggestions, self._start = state, suggestions, start
        self._left = list(state.ledger.unfinished_trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # noqa: ARG002 - trials have names of their own
        """The next trial's order, or that there is none."""
        if self._state.stop_requested or self._state.is_exhausted or self._state.repeated_error:
            return str(self.FINISHED)
        trial = self._left.pop(0) if self._left else self._suggestions.begin_next_trial()
        return str(self.FINISHED) if trial is None else self._start(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger knows."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is what is saved."""

    def restore(self, checkpoint_path: str) -> None:
        """The ledger is what is restored."""


class RungScheduler(_Stateless, FIFOScheduler):
    """Decides at every rung, and writes each decision down before Tune hears of it."""

    def __init__(self, state: SearchBudget) -> None:
        super().__init__()
        self._state = state

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401, ARG002
        """A trial waits at a rung for its decision."""
        ledger, search, number = self._state.ledger, self._state.search, result["trial"]
        passed = {rung.rung: rung for rung in ledger.trials[number].rungs}.get(result["rung"])
        if passed is not None and passed.go_on:  # it has failed since, and comes here again
            return str(TrialScheduler.CONTINUE)
        others = ledger.get_rung_values(result["rung"], result["bracket"], but=number)
        good = not self._state.is_exhausted and should_continue(search.scheduler, search.mode, result["value"], others)
        ledger.record_rung(number, _build_rung_result(result, go_on=good))
        if good:
            return str(TrialScheduler.CONTINUE)
        ledger.record_end(number, "stopped")
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401, ARG002
        """A trial has ended by itself, or was stopped by the method above."""
        ledger, number = self._state.ledger, result.get("trial")
        if result.get("kind") != "end" or number is None:
            return
        if result["state"] == "finished":
            ledger.record_rung(number, _build_rung_result(result, go_on=False))
        ledger.record_end(number, result["state"], result.get("error"), result.get("trained", 0))


def _build_rung_result(result: dict[str, Any], *, go_on: bool) -> RungResult:
    facts = {name: result[name] for name in ("rung", "step", "tokens", "value", "bracket")}
    return RungResult(**facts, go_on=go_on, last=result["kind"] == "end")


class EventLogCallback(_Stateless, Callback):
    """Notes failures, and keeps the screen up to date."""

    def __init__(self, state: SearchBudget, screen: Callable[[], None]) -> None:
        self._state, self._screen = state, screen
        self._beat = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ANN401, ARG002
        """Tune has looked around once."""
        if time.monotonic() - self._beat > _HEARTBEAT_SECONDS:
            self._beat = time.monotonic()
            self._state.ledger.record_heartbeat()
        self._screen()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """A trial has failed and is tried again."""
        self._state.ledger.record_failure(trial.config["number"], _read_failure_cause(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """A trial has failed as often as it may."""
        trained = read_trained_tokens(RunDirectory(Path(trial.config["run"])).metrics_path)
        self._state.ledger.record_end(trial.config["number"], "failed", _read_failure_cause(trial), trained)


def _read_failure_cause(trial: Any) -> str:  # noqa: ANN401 - Tune's trials have no types
    """The last line of what Tune has caught and written down."""
    path = Path(trial.error_file) if trial.error_file else None
    lines = [line for line in path.read_text().splitlines() if line.strip()] if path and path.is_file() else []
    return lines[-1].strip() if lines else "its process ended without a word"
