"""A search on the screen: its trials, the best first, a few lines however many there are."""

from __future__ import annotations

from collections.abc import Iterable

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.config.search import Search
from llm_training_toolkit.runs.table import clock
from llm_training_toolkit.search.event_log import Ledger, Trial
from llm_training_toolkit.search.results import ranked, tokens_of
from llm_training_toolkit.search.space import short, shown

_ROWS = 12
"""Trials shown; those at work always are."""
_COLOURS = {"begun": "green", "finished": "bold green", "stopped": "yellow", "failed": "red"}
_WORDS = {"begun": "running"}
_GAP = 2
"""Between columns, as rich puts it."""
_CAN_GO = ("tokens", "at step")
"""Left out of a narrow screen, this one first: what a trial tries and came to is what the table is for."""


def table(search: Search, ledger: Ledger, width: int) -> Table:
    """The trials as a table that stands on a screen of so many columns as well as it can."""
    order = ranked(ledger, search.mode)
    at_work = [trial for trial in order if trial.state == "begun"]
    kept = [trial for trial in order if trial.state != "begun"][: max(_ROWS - len(at_work), 1)]
    rows = [trial for trial in order if trial in kept or trial in at_work]
    found = Table(box=None, pad_edge=False, header_style="bold", caption=footer(search, ledger, len(order) - len(rows)))
    errors = ["error"] if any(trial.state == "failed" for trial in rows) else []
    titles = ["trial", "state", search.metric, "at step", "tokens", *search.search, *errors]
    cells = list(zip(*(_cells(trial)[: len(titles)] for trial in rows), strict=True)) or [()] * len(titles)
    columns = dict(zip(titles, cells, strict=True))
    # On a narrow screen errors and titles are folded before the values are.
    needed = {title: 0 if title == "error" else _widest(column) for title, column in columns.items()}
    for title in _CAN_GO:
        if sum(needed.values()) + _GAP * (len(needed) - 1) > width:
            del columns[title], needed[title]
    for title in columns:
        found.add_column(title, overflow="fold", min_width=needed[title] or None)
    for row in zip(*columns.values(), strict=True):
        found.add_row(*row)
    return found


def _widest(cells: Iterable[str]) -> int:
    return max((Text.from_markup(cell).cell_len for cell in cells), default=0)


def _cells(trial: Trial) -> tuple[str, ...]:
    state = _WORDS.get(trial.state, trial.state)
    return (
        trial.name,
        f"[{_COLOURS[trial.state]}]{state}[/]",
        f"{trial.last.value:.4f}" if trial.last else "",
        f"{trial.last.step:,}" if trial.last else "",
        f"{tokens_of(trial):,}" if trial.last else "",
        *(escape(short(value).strip('"')) for value in trial.parameters.values()),
        escape(trial.error or "") if trial.state == "failed" else "",
    )


def footer(search: Search, ledger: Ledger, hidden: int = 0) -> str:
    """What stands under the table: how far the search is, and what is left of its budget."""
    done = sum(trial.state != "begun" for trial in ledger.trials.values())
    parts = [f"and {hidden} more"] if hidden else []
    parts.append(f"{done} of {search.trials} trials ended" if search.trials else f"{done} trials ended")
    tokens = sum(map(tokens_of, ledger.trials.values()))
    budget = search.budget
    parts.append(f"{tokens:,} tokens" + (f" of {budget.tokens:,}" if budget and budget.tokens else ""))
    seconds = duration_seconds(budget.time) if budget and budget.time else None
    left = f", {clock(max(seconds - ledger.seconds(), 0.0))} left" if seconds is not None else ""
    parts.append(clock(ledger.seconds()) + left)
    return "; ".join(parts)


def line(search: Search, trial: Trial) -> str:
    """What has become of a trial, where there is no terminal to draw on."""
    at = f": {search.metric} {trial.last.value:.4f} after step {trial.last.step:,}" if trial.last else ""
    why = f" ({trial.error})" if trial.state == "failed" and trial.error else ""
    return f"{trial.name} {_WORDS.get(trial.state, trial.state)}{at}{why}; {shown(trial.parameters)}"
