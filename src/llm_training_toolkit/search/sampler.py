"""Sampler of trials: `points_to_evaluate` first, then the searcher's points. Decided from the event log alone."""

from __future__ import annotations

from collections.abc import Callable

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.space import (
    Parameters,
    TrialConfigBuilder,
    build_grid,
    draw_random_point,
    format_point,
    point_key,
)

PointProposer = Callable[[SearchConfig, EventLog, int], Parameters]  # point of a number, from the trials so far
_MAX_TRIES = 1000  # known or invalid points drawn in a row before the space counts as used up


class TrialSampler:
    """Chooses the next trial."""

    def __init__(self, trials: TrialConfigBuilder, event_log: EventLog, proposer: PointProposer | None) -> None:
        self._trials, self._search, self._event_log, self._proposer = trials, trials.search, event_log, proposer
        self._grid = build_grid(trials.search) if trials.search.searcher.name == "grid" else []

    def begin_next_trial(self) -> TrialRecord | None:
        """Record a new trial as begun and return it, or None if the space or the number of trials is used up."""
        number = len(self._event_log.trials)
        if self._search.trials is not None and number >= self._search.trials:
            return None
        found = self._find_initial_point() or self._sample_valid_point()
        if found is None:
            return None
        parameters, drawn = found
        self._event_log.record_begin(TrialRecord(number, parameters, drawn))
        return self._event_log.trials[number]

    def _get_known_keys(self) -> set[str]:
        tried = (trial.parameters for trial in self._event_log.trials.values())
        return {point_key(point) for point in (*tried, *self._event_log.invalid_points.values())}

    def _find_initial_point(self) -> tuple[Parameters, int | None] | None:
        known = self._get_known_keys()
        for point in self._search.points_to_evaluate:
            if point_key(point) not in known and not self._trials.find_problem(point):
                return point, None
        return None

    def _sample_valid_point(self) -> tuple[Parameters, int] | None:
        known = self._get_known_keys()
        for number in range(self._event_log.next_draw, self._event_log.next_draw + _MAX_TRIES):
            point = self._propose_point(number)
            if point is None:
                return None
            if point_key(point) in known:
                continue
            problem = self._trials.find_problem(point)
            if not problem:
                return point, number
            self._event_log.record_invalid_point(number, point, f"{format_point(point)}: {problem}")
            known.add(point_key(point))
        return None

    def _propose_point(self, number: int) -> Parameters | None:
        if self._search.searcher.name == "grid":
            return self._grid[number] if number < len(self._grid) else None
        if self._proposer is not None:
            return self._proposer(self._search, self._event_log, number)
        return draw_random_point(self._search, number)
