"""Metrics of a run as one row a step: of steps that were done again, the last attempt counts. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.runs.json_lines import is_metrics_row, read_json_lines

MetricRow = Mapping[str, float]


@dataclass(frozen=True)
class RunHistory:
    """Metrics of every step of a run, over all its attempts."""

    rows: tuple[MetricRow, ...]
    """One row a step, in order: `step`, `attempt`, `time` and the metrics by name."""
    all_rows: tuple[MetricRow, ...]
    """Every line of metrics.jsonl as it was written, with the steps that were done again."""

    @property
    def training_rows(self) -> tuple[MetricRow, ...]:
        """The rows of training steps, without those of evaluations alone."""
        return tuple(row for row in self.rows if "train/loss" in row)

    @property
    def repeated_steps(self) -> int:
        """Training steps that were done more than once, counted as often as they were done again."""
        return sum("train/loss" in row for row in self.all_rows) - len(self.training_rows)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all metrics, in the order in which they first occur."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row))


def read_history(metrics: Path) -> RunHistory:
    """Read metrics.jsonl; without a file the history is empty. Lines that are no row of metrics are skipped."""
    return build_history(row for row in read_json_lines(metrics) if is_metrics_row(row))


def build_history(rows: Iterable[MetricRow]) -> RunHistory:
    """Build the history from the rows as they were written."""
    written = tuple(rows)
    counting = _find_first_repeated_steps(written)
    by_step: dict[int, dict[str, float]] = {}
    for row in written:
        step, attempt = int(row["step"]), int(row.get("attempt", 0))
        if step < counting[attempt]:
            by_step.setdefault(step, {}).update(row)
    return RunHistory(tuple(by_step[step] for step in sorted(by_step)), written)


def _find_first_repeated_steps(rows: Iterable[MetricRow]) -> dict[int, float]:
    """Return for each attempt the step from which on a later attempt has trained anew; infinity if none has."""
    first_trained: dict[int, int] = {}
    attempts: set[int] = set()
    for row in rows:
        attempt = int(row.get("attempt", 0))
        attempts.add(attempt)
        if "train/loss" in row:
            first_trained.setdefault(attempt, int(row["step"]))
    counting, following = {}, float("inf")
    for attempt in sorted(attempts, reverse=True):
        counting[attempt] = following
        following = min(following, first_trained.get(attempt, following))
    return counting
