"""Conditions for more trials of a search: stop request, budget, repeated failures."""

from __future__ import annotations

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.results import get_trial_tokens
from llm_training_toolkit.search.space import count_combinations, point_key

_MAX_EARLY_FAILURES = 8  # trials in a row that fail before their first rung: a token budget would never end these


class SearchBudget:
    """State of a search against its limits."""

    def __init__(self, search: SearchConfig, event_log: EventLog) -> None:
        self.search, self.event_log = search, event_log
        self.stop_requested = False
        """Set when a person asks the search to stop."""
        self._before = {trial.number for trial in self._ended_trials}

    @property
    def is_exhausted(self) -> bool:
        """Return whether the budget is used up."""
        budget = self.search.budget
        if budget is None:
            return False
        seconds = parse_duration_seconds(budget.time) if budget.time else None
        tokens = sum(map(get_trial_tokens, self.event_log.trials.values()))
        return (budget.tokens is not None and tokens >= budget.tokens) or (
            seconds is not None and self.event_log.compute_active_seconds() >= seconds
        )

    @property
    def _ended_trials(self) -> list[TrialRecord]:
        return [trial for trial in self.event_log.trials.values() if trial.state != "begun"]

    @property
    def repeated_error(self) -> str:
        """Newest error if the last 8 trials of this start all failed before their first rung; otherwise empty."""
        newest = [trial for trial in self._ended_trials if trial.number not in self._before][-_MAX_EARLY_FAILURES:]
        if len(newest) < _MAX_EARLY_FAILURES or any(trial.state != "failed" or trial.rungs for trial in newest):
            return ""
        return newest[-1].error or "no error was written down"

    @property
    def is_search_finished(self) -> bool:
        """Return whether the search is done: budget used up, or all trials ended and no other to begin."""
        count, search = len(self.event_log.trials), self.search
        if self.is_exhausted:
            return True
        if self.event_log.unfinished_trials:
            return False
        if search.trials is not None and count >= search.trials:
            return True
        every = count_combinations(search)
        left_out = {point_key(point) for point in self.event_log.invalid_points.values()}
        return every is not None and count + len(left_out) >= every
