"""Tables that compare evaluations of several runs. Imports no torch, for a fast start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.records import EvalRecord, read_eval_records
from llm_training_toolkit.runs.directory import RunDirectory, check_run

# Columns, in this order, if a record of the task has the figure.
_METRIC_COLUMNS = (
    *("pass@1", "pass@10", "pass@100", "exact_match", "edit_similarity"),
    *("loss", "perplexity", "bits_per_byte"),
    "valid",
)
_COUNT_COLUMNS = ("problems", "documents", "turns")  # sample counts of the metrics that are not means over tokens


def collect_eval_records(runs: Sequence[RunDirectory]) -> list[EvalRecord]:
    """Read the records of several runs, sorted by task and data. Raises PlanError if there are none."""
    if not runs:
        raise PlanError("--compare: name the directories of runs")
    found = [evaluation for run in runs for evaluation in read_eval_records(check_run(run))]
    if not found:
        raise PlanError("--compare: none of these runs has been evaluated: ltt evaluate RUN --task … does it")
    return sorted(found, key=lambda each: (each.task, each.data))


def build_eval_tables(found: Sequence[EvalRecord]) -> Iterator[Table]:
    """Build one table per task, with a row per record. `found` must be sorted by task."""
    for task, group in groupby(found, key=lambda each: each.task):
        evaluations = list(group)
        known = {name for evaluation in evaluations for name in evaluation.figures}
        columns = [name for name in (*_METRIC_COLUMNS, *_COUNT_COLUMNS) if name in known]
        table = Table(box=None, pad_edge=False, header_style="bold", title=task, title_justify="left")
        table.add_column("run", no_wrap=True)
        for title in ("step", *columns):
            table.add_column(title, justify="right", no_wrap=True)
        differing = _find_differing_settings(evaluations)
        for title in ("data", *(["settings"] if differing else [])):
            table.add_column(title, overflow="fold")
        for evaluation in evaluations:
            table.add_row(
                escape(evaluation.run or ""),
                "" if evaluation.step is None else f"{evaluation.step:,}",
                *(
                    format_metric_value(name, evaluation.figures[name]) if name in evaluation.figures else ""
                    for name in columns
                ),
                escape(evaluation.data),
                *([escape(_format_settings(evaluation, differing))] if differing else []),
            )
        yield table


def _find_differing_settings(evaluations: Sequence[EvalRecord]) -> list[str]:
    """Return the settings with more than one value."""
    names = dict.fromkeys(name for evaluation in evaluations for name in evaluation.settings)
    values = {name: {str(each.settings[name]) for each in evaluations if name in each.settings} for name in names}
    return [name for name in names if len(values[name]) > 1]


def _format_settings(evaluation: EvalRecord, names: Sequence[str]) -> str:
    return ", ".join(
        f"{name} {evaluation.settings[name]}" for name in names if evaluation.settings.get(name) is not None
    )


def format_summary_line(evaluation: EvalRecord) -> str:
    """Return a record's metrics in one line."""
    figures = [
        f"{name} {format_metric_value(name, value)}" for name, value in evaluation.figures.items() if is_metric(name)
    ]
    return f"{evaluation.task}: {', '.join(figures)} ({evaluation.data})"


def is_metric(name: str) -> bool:
    """Return whether a figure is a metric; the others are counts."""
    return name in _METRIC_COLUMNS


def format_metric_value(name: str, value: float) -> str:
    """Format a figure: counts as integers, metrics with four decimals."""
    if not is_metric(name):
        return f"{value:,.0f}"
    return f"{value:.4f}" if value < 1e6 else f"{value:.3g}"
