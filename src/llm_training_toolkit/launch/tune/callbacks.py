"""Ray Tune callbacks of a search, driven by its event log: next trial, rung decisions, failures, ends."""

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

_HEARTBEAT_SECONDS = 30.0  # active time that a killed driver may fail to count
TrialSpecBuilder = Callable[[TrialRecord], dict[str, Any]]  # returns a `TrialSpec` as plain data


class _Stateless:
    """Base class that pickles to an empty state: Tune's snapshots are never read, the event log is the state."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class EventLogSearcher(_Stateless, Searcher):
    """Searcher of Tune: first the unfinished trials of the event log, then new ones."""

    def __init__(self, budget: SearchBudget, sampler: TrialSampler, build_spec: TrialSpecBuilder) -> None:
        super().__init__()
        self._budget, self._sampler, self._build_spec = budget, sampler, build_spec
        self._unfinished = list(budget.event_log.unfinished_trials)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # noqa: ARG002 - trials have names of their own
        """Return the next trial's spec, or FINISHED."""
        if self._budget.stop_requested or self._budget.is_exhausted or self._budget.repeated_error:
            return str(self.FINISHED)
        trial = self._unfinished.pop(0) if self._unfinished else self._sampler.begin_next_trial()
        return str(self.FINISHED) if trial is None else self._build_spec(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ignore it: `RungScheduler` and `EventLogCallback` record the end."""

    def save(self, checkpoint_path: str) -> None:
        """Ignore it: the event log is the saved state."""

    def restore(self, checkpoint_path: str) -> None:
        """Ignore it: each start reads the event log."""


class RungScheduler(_Stateless, FIFOScheduler):
    """Decides at each rung whether a trial continues; records the decision before Tune learns it."""

    def __init__(self, budget: SearchBudget) -> None:
        super().__init__()
        self._budget = budget

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401, ARG002
        """Decide whether the trial that waits at a rung continues."""
        event_log, search, number = self._budget.event_log, self._budget.search, result["trial"]
        passed = {rung.rung: rung for rung in event_log.trials[number].rungs}.get(result["rung"])
        if passed is not None and passed.promoted:  # passed before the trial failed and was retried
            return str(TrialScheduler.CONTINUE)
        others = event_log.get_rung_values(result["rung"], result["bracket"], excluding=number)
        promoted = not self._budget.is_exhausted and should_continue(
            search.scheduler, search.mode, result["value"], others
        )
        event_log.record_rung(number, _build_rung_result(result, promoted=promoted))
        if promoted:
            return str(TrialScheduler.CONTINUE)
        event_log.record_end(number, "stopped")
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401, ARG002
        """Record the end of a trial, unless `on_trial_result` stopped it and recorded that."""
        event_log, number = self._budget.event_log, result.get("trial")
        if result.get("kind") != "end" or number is None:
            return
        if result["state"] == "finished":
            event_log.record_rung(number, _build_rung_result(result, promoted=False))
        event_log.record_end(number, result["state"], result.get("error"), result.get("trained", 0))


def _build_rung_result(result: dict[str, Any], *, promoted: bool) -> RungResult:
    fields = {name: result[name] for name in ("rung", "step", "tokens", "value", "bracket")}
    return RungResult(**fields, promoted=promoted, last=result["kind"] == "end")


class EventLogCallback(_Stateless, Callback):
    """Records heartbeats and failures, and refreshes the display."""

    def __init__(self, budget: SearchBudget, refresh_display: Callable[[], None]) -> None:
        self._budget, self._refresh_display = budget, refresh_display
        self._last_heartbeat = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ANN401, ARG002
        """Refresh the display, and record a heartbeat if one is due, after each iteration of Tune."""
        if time.monotonic() - self._last_heartbeat > _HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            self._budget.event_log.record_heartbeat()
        self._refresh_display()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """Record a failure that Tune retries."""
        self._budget.event_log.record_failure(trial.config["number"], _read_failure_cause(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """Record the end of a trial without retries left."""
        trained = read_trained_tokens(RunDirectory(Path(trial.config["run"])).metrics_path)
        self._budget.event_log.record_end(trial.config["number"], "failed", _read_failure_cause(trial), trained)


def _read_failure_cause(trial: Any) -> str:  # noqa: ANN401 - Tune's trials have no types
    """Return the last line of the error file that Tune wrote for a trial."""
    path = Path(trial.error_file) if trial.error_file else None
    lines = [line for line in path.read_text().splitlines() if line.strip()] if path and path.is_file() else []
    return lines[-1].strip() if lines else "its process ended without a word"
