"""Whether a search may begin other trials: a person's wish to stop, and its budget."""

from __future__ import annotations

from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.config.search import Search
from llm_training_toolkit.search.event_log import Ledger, Trial
from llm_training_toolkit.search.results import tokens_of
from llm_training_toolkit.search.space import combinations, same

_HOPELESS = 8
"""Trials in a row that fail before their first rung: whatever fails them, a budget in tokens would never end it."""


class State:
    """How a search stands."""

    def __init__(self, search: Search, ledger: Ledger) -> None:
        self.search, self.ledger = search, ledger
        self.stopping = False
        """A person has asked the search to stop."""
        self._before = {trial.number for trial in self._ended}

    @property
    def spent(self) -> bool:
        """Whether the budget is used up."""
        budget = self.search.budget
        if budget is None:
            return False
        seconds = duration_seconds(budget.time) if budget.time else None
        tokens = sum(map(tokens_of, self.ledger.trials.values()))
        return (budget.tokens is not None and tokens >= budget.tokens) or (
            seconds is not None and self.ledger.seconds() >= seconds
        )

    @property
    def _ended(self) -> list[Trial]:
        return [trial for trial in self.ledger.trials.values() if trial.state != "begun"]

    @property
    def hopeless(self) -> str:
        """The newest error where the last trials of this start have all failed at once; empty where they have not."""
        newest = [trial for trial in self._ended if trial.number not in self._before][-_HOPELESS:]
        if len(newest) < _HOPELESS or any(trial.state != "failed" or trial.rungs for trial in newest):
            return ""
        return newest[-1].error or "no error was written down"

    @property
    def over(self) -> bool:
        """Whether nothing is left to do: no trial at work, and no other one to begin."""
        count, search = len(self.ledger.trials), self.search
        if self.spent:
            return True
        if self.ledger.unfinished:
            return False
        if search.trials is not None and count >= search.trials:
            return True
        every = combinations(search)
        left_out = {same(point) for point in self.ledger.left_out.values()}
        return every is not None and count + len(left_out) >= every
