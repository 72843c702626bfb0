"""report.html: one page that needs no network, its plots drawn here as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_training_toolkit.config.search import Distribution, Search
from llm_training_toolkit.search.event_log import Ledger, Trial
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
_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 28, 44
Tick = tuple[float, str]
"""A place from 0 to 1, and what stands there."""


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


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates."""

    name: str
    places: Sequence[float]
    """Where each line crosses it, from 0 (bottom) to 1 (top)."""
    ticks: Sequence[Tick]


def curve(points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """A value that changes in steps."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    right = max(xs) or 1.0
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + x / right * wide, _TOP + (high - y) / (high - low) * tall

    path, before = [], None
    for x, y in points:
        if before is not None:
            path.append(at(x, before))
        path.append(at(x, y))
        before = y
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    dots = "".join(
        f'<circle cx="{at(x, y)[0]:.1f}" cy="{at(x, y)[1]:.1f}" r="4" fill="var(--mark)">'
        f"<title>{y:.5g} after {x:,.0f} tokens</title></circle>"
        for x, y in points[:-1] or points
    )
    frame = [_grid_line(at(0, y)[1], f"{y:.4g}") for y in _even(low, high)]
    frame += [_svg_text(at(x, 0)[0], _HEIGHT - 24, _large(x), "middle", "dim") for x in _even(0.0, right)]
    frame.append(_svg_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 6, across, "middle"))
    frame.append(_svg_text(4, 12, up))
    stroke = 'fill="none" stroke="var(--mark)" stroke-width="2"'
    return _svg(_HEIGHT, f'{"".join(frame)}<polyline class="plot" points="{line}" {stroke}/>{dots}')


def parallel(axes: Sequence[Axis], strength: Sequence[float], titles: Sequence[str]) -> str:
    """Parallel coordinates: a line for each trial, the weakest first, so that the strongest lies on top."""
    top, bottom = _TOP + 12, _HEIGHT - 14
    xs = [_LEFT + 60 + number * (_WIDTH - 200) / max(len(axes) - 1, 1) for number in range(len(axes))]

    def y(place: float) -> float:
        return bottom - place * (bottom - top)

    lines = []
    for number in sorted(range(len(strength)), key=lambda number: strength[number]):
        points = " ".join(f"{x:.1f},{y(axis.places[number]):.1f}" for x, axis in zip(xs, axes, strict=True))
        looks = f'stroke-width="{1 + 2 * strength[number]:.1f}" stroke-opacity="{0.15 + 0.75 * strength[number]:.2f}"'
        title = html.escape(titles[number])
        lines.append(f'<polyline class="plot" points="{points}" fill="none" stroke="var(--mark)" {looks}>')
        lines.append(f"<title>{title}</title></polyline>")
    frame = []
    for x, axis in zip(xs, axes, strict=True):
        frame.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        frame.append(_svg_text(x, top - 16, axis.name, "middle"))
        frame += [_svg_text(x + 6, y(place) + 4, text, "start", "dim") for place, text in axis.ticks]
    return _svg(_HEIGHT, "".join([*lines, *frame]))


def bars(values: Sequence[tuple[str, float]]) -> str:
    """A bar from 0 to 1 for each name."""
    height, wide = 26, _WIDTH - 330
    parts = []
    for number, (name, value) in enumerate(values):
        y = 6 + number * height
        parts.append(_svg_text(220, y + 13, name, "end"))
        size = f'width="{max(value * wide, 1):.1f}" height="{height - 8}"'
        parts.append(f'<rect class="plot" x="230" y="{y}" {size} fill="var(--mark)"/>')
        parts.append(_svg_text(238 + value * wide, y + 13, f"{value:.0%}", "start", "dim"))
    return _svg(len(values) * height + 10, "".join(parts))


def _even(low: float, high: float) -> list[float]:
    return [low + (high - low) * part / 4 for part in range(5)]


def _grid_line(y: float, text: str) -> str:
    line = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _svg_text(_LEFT - 8, y + 4, text, "end", "dim")


def _svg_text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{html.escape(text)}</text>'


def _large(number: float) -> str:
    """A count with its order of magnitude: 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _svg(height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{content}</svg>'
