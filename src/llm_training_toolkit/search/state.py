"""Whether a search may begin other trials: a person's wish to stop, and its budget."""

from __future__ import annotations

from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.config.search import Search
from llm_training_toolkit.search.ledger import Ledger
from llm_training_toolkit.search.results import tokens_of
from llm_training_toolkit.search.space import combinations


class State:
    """How a search stands."""

    def __init__(self, search: Search, ledger: Ledger) -> None:
        self.search, self.ledger = search, ledger
        self.stopping = False
        """A person has asked the search to stop."""

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
        return every is not None and count + len(self.ledger.left_out) >= every
