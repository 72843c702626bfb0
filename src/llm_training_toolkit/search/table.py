"""Table of a search on the terminal: its trials, the best first, in a limited number of lines."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.runs.table import format_duration
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.results import get_trial_tokens, rank_trials
from llm_training_toolkit.search.space import format_point, format_short_value

_MAX_ROWS = 12  # running trials are always shown
_STATE_COLOURS = {"begun": "green", "finished": "bold green", "stopped": "yellow", "failed": "red"}
_STATE_LABELS = {"begun": "running"}
_COLUMN_GAP = 2  # between columns, as rich draws it
_OPTIONAL_COLUMNS = ("tokens", "at step")  # dropped in this order on a narrow screen; the rest is the table's purpose


def build_trials_table(search: SearchConfig, event_log: EventLog, width: int) -> Table:
    """Build the trials table to fit a screen of `width` columns as well as possible."""
    order = rank_trials(event_log, search.mode)
    at_work = [trial for trial in order if trial.state == "begun"]
    kept = [trial for trial in order if trial.state != "begun"][: max(_MAX_ROWS - len(at_work), 1)]
    rows = [trial for trial in order if trial in kept or trial in at_work]
    found = Table(
        box=None, pad_edge=False, header_style="bold", caption=format_footer(search, event_log, len(order) - len(rows))
    )
    errors = ["error"] if any(trial.state == "failed" for trial in rows) else []
    titles = ["trial", "state", search.metric, "at step", "tokens", *search.search, *errors]
    cells = list(zip(*(_format_cells(trial)[: len(titles)] for trial in rows), strict=True)) or [()] * len(titles)
    columns = dict(zip(titles, cells, strict=True))
    # On a narrow screen errors and titles fold before values.
    needed = {title: 0 if title == "error" else _compute_max_width(column) for title, column in columns.items()}
    for title in _OPTIONAL_COLUMNS:
        if sum(needed.values()) + _COLUMN_GAP * (len(needed) - 1) > width:
            del columns[title], needed[title]
    for title in columns:
        found.add_column(title, overflow="fold", min_width=needed[title] or None)
    for row in zip(*columns.values(), strict=True):
        found.add_row(*row)
    return found


def _compute_max_width(cells: Iterable[str]) -> int:
    return max((Text.from_markup(cell).cell_len for cell in cells), default=0)


def _format_cells(trial: TrialRecord) -> tuple[str, ...]:
    state = _STATE_LABELS.get(trial.state, trial.state)
    return (
        trial.name,
        f"[{_STATE_COLOURS[trial.state]}]{state}[/]",
        f"{trial.last_rung.value:.4f}" if trial.last_rung else "",
        f"{trial.last_rung.step:,}" if trial.last_rung else "",
        f"{get_trial_tokens(trial):,}" if trial.last_rung else "",
        *(escape(format_short_value(value).strip('"')) for value in trial.parameters.values()),
        escape(trial.error or "") if trial.state == "failed" else "",
    )


def format_footer(search: SearchConfig, event_log: EventLog, hidden: int = 0) -> str:
    """Format the footer of the table: progress of the search and its remaining budget."""
    done = sum(trial.state != "begun" for trial in event_log.trials.values())
    parts = [f"and {hidden} more"] if hidden else []
    parts.append(f"{done} of {search.trials} trials ended" if search.trials else f"{done} trials ended")
    tokens = sum(map(get_trial_tokens, event_log.trials.values()))
    budget = search.budget
    parts.append(f"{tokens:,} tokens" + (f" of {budget.tokens:,}" if budget and budget.tokens else ""))
    seconds = parse_duration_seconds(budget.time) if budget and budget.time else None
    left = (
        f", {format_duration(max(seconds - event_log.compute_active_seconds(), 0.0))} left"
        if seconds is not None
        else ""
    )
    parts.append(format_duration(event_log.compute_active_seconds()) + left)
    return "; ".join(parts)


def format_trial_line(search: SearchConfig, trial: TrialRecord) -> str:
    """Format the state of a trial as one line, for output without a terminal."""
    at = f": {search.metric} {trial.last_rung.value:.4f} after step {trial.last_rung.step:,}" if trial.last_rung else ""
    why = f" ({trial.error})" if trial.state == "failed" and trial.error else ""
    return f"{trial.name} {_STATE_LABELS.get(trial.state, trial.state)}{at}{why}; {format_point(trial.parameters)}"
