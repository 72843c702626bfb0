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
from llm_training_toolkit.search.budget import State
from llm_training_toolkit.search.early_stopping import goes_on
from llm_training_toolkit.search.event_log import Rung, Trial
from llm_training_toolkit.search.results import spent
from llm_training_toolkit.search.sampler import Suggestions

_BEAT_EVERY = 30.0
"""Seconds of work that a killed driver may leave out of the time that counts."""
Start = Callable[[Trial], dict[str, Any]]
"""A trial as the order that its driver gets."""


class _Unsaved:
    """A part that Tune writes into its own snapshot, which nobody reads: the ledger has what matters."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Source(_Unsaved, Searcher):
    """Tune's source of trials: first those that had begun, then new ones."""

    def __init__(self, state: State, suggestions: Suggestions, start: Start) -> None:
        super().__init__()
        self._state, self._suggestions, self._start = state, suggestions, start
        self._left = list(state.ledger.unfinished)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # noqa: ARG002 - trials have names of their own
        """The next trial's order, or that there is none."""
        if self._state.stopping or self._state.spent or self._state.hopeless:
            return str(self.FINISHED)
        trial = self._left.pop(0) if self._left else self._suggestions.next()
        return str(self.FINISHED) if trial is None else self._start(trial)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger knows."""

    def save(self, checkpoint_path: str) -> None:
        """The ledger is what is saved."""

    def restore(self, checkpoint_path: str) -> None:
        """The ledger is what is restored."""


class Gate(_Unsaved, FIFOScheduler):
    """Decides at every rung, and writes each decision down before Tune hears of it."""

    def __init__(self, state: State) -> None:
        super().__init__()
        self._state = state

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ANN401, ARG002
        """A trial waits at a rung for its decision."""
        ledger, search, number = self._state.ledger, self._state.search, result["trial"]
        passed = {rung.rung: rung for rung in ledger.trials[number].rungs}.get(result["rung"])
        if passed is not None and passed.go_on:  # it has failed since, and comes here again
            return str(TrialScheduler.CONTINUE)
        others = ledger.values_at(result["rung"], result["bracket"], but=number)
        good = not self._state.spent and goes_on(search.scheduler, search.mode, result["value"], others)
        ledger.rung(number, _rung(result, go_on=good))
        if good:
            return str(TrialScheduler.CONTINUE)
        ledger.end(number, "stopped")
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:  # noqa: ANN401, ARG002
        """A trial has ended by itself, or was stopped by the method above."""
        ledger, number = self._state.ledger, result.get("trial")
        if result.get("kind") != "end" or number is None:
            return
        if result["state"] == "finished":
            ledger.rung(number, _rung(result, go_on=False))
        ledger.end(number, result["state"], result.get("error"), result.get("trained", 0))


def _rung(result: dict[str, Any], *, go_on: bool) -> Rung:
    facts = {name: result[name] for name in ("rung", "step", "tokens", "value", "bracket")}
    return Rung(**facts, go_on=go_on, last=result["kind"] == "end")


class Watcher(_Unsaved, Callback):
    """Notes failures, and keeps the screen up to date."""

    def __init__(self, state: State, screen: Callable[[], None]) -> None:
        self._state, self._screen = state, screen
        self._beat = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ANN401, ARG002
        """Tune has looked around once."""
        if time.monotonic() - self._beat > _BEAT_EVERY:
            self._beat = time.monotonic()
            self._state.ledger.beat()
        self._screen()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """A trial has failed and is tried again."""
        self._state.ledger.failure(trial.config["number"], _cause(trial))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ANN401, ARG002
        """A trial has failed as often as it may."""
        trained = spent(RunDirectory(Path(trial.config["run"])).metrics)
        self._state.ledger.end(trial.config["number"], "failed", _cause(trial), trained)


def _cause(trial: Any) -> str:  # noqa: ANN401 - Tune's trials have no types
    """The last line of what Tune has caught and written down."""
    path = Path(trial.error_file) if trial.error_file else None
    lines = [line for line in path.read_text().splitlines() if line.strip()] if path and path.is_file() else []
    return lines[-1].strip() if lines else "its process ended without a word"
