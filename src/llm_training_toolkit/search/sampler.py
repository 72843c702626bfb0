"""The next points to try: those to try first, then those of the searcher. Decided from the ledger alone."""

from __future__ import annotations

from collections.abc import Callable

from llm_training_toolkit.config.search import Search
from llm_training_toolkit.search.event_log import Ledger, Trial
from llm_training_toolkit.search.space import Parameters, Trials, draw, grid, same, shown

Learner = Callable[[Search, Ledger, int], Parameters]
"""Proposes the point of a number, from what the trials so far have shown."""
_TRIES = 1000
"""Points drawn in a row that are known or impossible before the space counts as used up."""


class Suggestions:
    """Which trial begins next."""

    def __init__(self, trials: Trials, ledger: Ledger, learner: Learner | None) -> None:
        self._trials, self._search, self._ledger, self._learner = trials, trials.search, ledger, learner
        self._grid = grid(trials.search) if trials.search.searcher.name == "grid" else []

    def next(self) -> Trial | None:
        """A trial that has not begun, written down as begun; None when there is no other."""
        number = len(self._ledger.trials)
        if self._search.trials is not None and number >= self._search.trials:
            return None
        found = self._first() or self._drawn()
        if found is None:
            return None
        parameters, drawn = found
        self._ledger.begin(Trial(number, parameters, drawn))
        return self._ledger.trials[number]

    def _known(self) -> set[str]:
        tried = (trial.parameters for trial in self._ledger.trials.values())
        return {same(point) for point in (*tried, *self._ledger.left_out.values())}

    def _first(self) -> tuple[Parameters, int | None] | None:
        known = self._known()
        for point in self._search.first:
            if same(point) not in known and not self._trials.problem(point):
                return point, None
        return None

    def _drawn(self) -> tuple[Parameters, int] | None:
        known = self._known()
        for number in range(self._ledger.next_draw, self._ledger.next_draw + _TRIES):
            point = self._point(number)
            if point is None:
                return None
            if same(point) in known:
                continue
            problem = self._trials.problem(point)
            if not problem:
                return point, number
            self._ledger.leave_out(number, point, f"{shown(point)}: {problem}")
            known.add(same(point))
        return None

    def _point(self, number: int) -> Parameters | None:
        if self._search.searcher.name == "grid":
            return self._grid[number] if number < len(self._grid) else None
        if self._learner is not None:
            return self._learner(self._search, self._ledger, number)
        return draw(self._search, number)
