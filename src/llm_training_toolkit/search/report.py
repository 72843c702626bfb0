"""report.html: one page that needs no network, its plots drawn here as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from llm_training_toolkit.config.search import Distribution, Search
from llm_training_toolkit.search.ledger import Ledger, Trial
from llm_training_toolkit.search.plots import Axis, bars, curve, parallel
from llm_training_toolkit.search.results import best, importance, progress, ranked
from llm_training_toolkit.search.space import same, shown

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --dim: #6b7785; --line: #d5dbe1; --back: #ffffff; --mark: #1769aa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaee; --dim: #98a4b0; --line: #3a444e; --back: #14191e; --mark: #6db3f2; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; } p { margin: .3rem 0; }
.dim { color: var(--dim); } svg { width: 100%; height: auto; display: block; } svg text { fill: var(--ink);
  font-size: 12px; } svg .dim { fill: var(--dim);
  paint-order: stroke; stroke: var(--back); stroke-width: 4px; } svg .axis { stroke: var(--line); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.best td { font-weight: 600; color: var(--mark); }
"""


def page(search: Search, ledger: Ledger, name: str, tokens: int) -> str:
    """The page of a search; `tokens` is what all its trials have trained on."""
    winner = best(ledger, search.mode)
    told = f"{len(ledger.trials)} trials, {tokens:,} tokens"
    won = ""
    if winner is not None and winner.last is not None:
        won = (
            f"<p><b>{winner.name}</b>: {_text(search.metric)} <b>{winner.last.value:.5g}</b> after step "
            f"{winner.last.step:,} with {_text(shown(winner.parameters))}</p>"
        )
    parts = [
        f"<h1>{_text(name)}</h1><p class=dim>{told}; {_text(search.scheduler.name)}, {_text(search.searcher.name)}</p>",
        won,
        _section(
            "Best so far",
            "The best value that any trial has come to, against the tokens of all trials.",
            _best_so_far(search, ledger),
        ),
        _section("Trials", "A line each; the better, the stronger.", _parallel(search, ledger)),
        _section(
            "Importance",
            "How much of the variance between trials a key explains alone, at the rung that most trials came to.",
            _importance(search, ledger),
        ),
        f"<h2>Table</h2><div class=scroll>{_table(search, ledger)}</div>",
    ]
    return (
        f'<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{_text(name)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, what: str, content: str) -> str:
    return f"<h2>{title}</h2><p class=dim>{what}</p>{content}"


def _best_so_far(search: Search, ledger: Ledger) -> str:
    points = progress(ledger, search.mode)
    if not points:
        return "<p>No trial has come to a rung with a finite value.</p>"
    return curve(points, across="tokens of all trials", up=search.metric)


def _parallel(search: Search, ledger: Ledger) -> str:
    order = [trial for trial in ranked(ledger, search.mode) if trial.last and math.isfinite(trial.last.value)]
    if not order:
        return "<p>No trial has come to a rung with a finite value.</p>"
    axes = [_axis(name, values, order) for name, values in search.search.items()]
    measured = [trial.last.value for trial in order if trial.last]
    low, high = min(measured), max(measured)
    span = high - low or 1.0
    ends = ((0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")) if high > low else ((0.5, f"{low:.4g}"),)
    axes.append(
        Axis(search.metric, [(value - low) / span for value in measured] if high > low else [0.5] * len(order), ends)
    )
    strength = [1.0 - position / max(len(order) - 1, 1) for position in range(len(order))]
    return parallel(axes, strength, [f"{trial.name}: {shown(trial.parameters)}" for trial in order])


def _axis(name: str, values: Distribution, trials: Sequence[Trial]) -> Axis:
    """Where each trial crosses the axis of a key, from 0 at the bottom to 1 at the top."""
    if values.choice is not None:
        names = [same({"": choice}) for choice in values.corners]
        places = {text: (index + 0.5) / len(names) for index, text in enumerate(names)}
        ticks = tuple((places[text], text[len('{"": ') : -1]) for text in names)
        return Axis(name, [places[same({"": trial.parameters[name]})] for trial in trials], ticks)
    low, high = values.ends
    scale = math.log if values.log_uniform is not None else float
    at = [(scale(trial.parameters[name]) - scale(low)) / (scale(high) - scale(low)) for trial in trials]
    return Axis(name, at, ((0.0, f"{low:g}"), (1.0, f"{high:g}")))


def _importance(search: Search, ledger: Ledger) -> str:
    found = importance(search, ledger)
    if not found:
        return "<p>Too few trials differ at one rung to tell.</p>"
    return bars(sorted(found.items(), key=lambda item: -item[1]))


def _table(search: Search, ledger: Ledger) -> str:
    heads = ["trial", "state", search.metric, "step", "tokens", *search.search, "error"]
    winner = best(ledger, search.mode)
    rows = [_row(search, trial, won=trial is winner) for trial in ranked(ledger, search.mode)]
    numbers = {search.metric, "step", "tokens"}
    head = "".join(f"<th{' class=number' if name in numbers else ''}>{_text(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _row(search: Search, trial: Trial, *, won: bool) -> str:
    last = trial.last
    cells = [f"<td>{trial.name}</td><td>{'unfinished' if trial.state == 'begun' else trial.state}</td>"]
    shown_numbers = (f"{last.value:.5g}", f"{last.step:,}", f"{last.tokens:,}") if last else ("", "", "")
    cells += [f"<td class=number>{text}</td>" for text in shown_numbers]
    cells += [f"<td>{_text(shown({name: trial.parameters[name]}).partition(' = ')[2])}</td>" for name in search.search]
    cells.append(f"<td>{_text(trial.error or '')}</td>")
    return f"<tr{' class=best' if won else ''}>{''.join(cells)}</tr>"
