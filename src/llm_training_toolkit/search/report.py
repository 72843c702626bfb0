"""report.html: one page that needs no network, with plots drawn here as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_training_toolkit.config.search import ParameterDistribution, SearchConfig
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.results import compute_best_so_far, compute_importance, find_best_trial, rank_trials
from llm_training_toolkit.search.space import format_point, point_key

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
Tick = tuple[float, str]  # position from 0 to 1, label


def render_report_page(search: SearchConfig, event_log: EventLog, name: str, tokens: int) -> str:
    """Render the page of a search; `tokens` is the total of all its trials."""
    winner = find_best_trial(event_log, search.mode)
    told = f"{len(event_log.trials)} trials, {tokens:,} tokens"
    won = ""
    if winner is not None and winner.last_rung is not None:
        won = (
            f"<p><b>{winner.name}</b>: {_escape_html(search.metric)} <b>{winner.last_rung.value:.5g}</b> after step "
            f"{winner.last_rung.step:,} with {_escape_html(format_point(winner.parameters))}</p>"
        )
    parts = [
        f"<h1>{_escape_html(name)}</h1><p class=dim>{told}; {_escape_html(search.scheduler.name)}, "
        f"{_escape_html(search.searcher.name)}</p>",
        won,
        _format_section(
            "Best so far",
            "The best value that any trial has come to, against the tokens of all trials.",
            _plot_best_so_far(search, event_log),
        ),
        _format_section(
            "Trials", "A line each; the better, the stronger.", _plot_parallel_coordinates(search, event_log)
        ),
        _format_section(
            "Importance",
            "How much of the variance between trials a key explains alone, at the rung that most trials came to.",
            _plot_importance(search, event_log),
        ),
        f"<h2>Table</h2><div class=scroll>{_format_trials_table(search, event_log)}</div>",
    ]
    return (
        f'<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{_escape_html(name)}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _escape_html(value: object) -> str:
    return html.escape(str(value))


def _format_section(title: str, what: str, content: str) -> str:
    return f"<h2>{title}</h2><p class=dim>{what}</p>{content}"


def _plot_best_so_far(search: SearchConfig, event_log: EventLog) -> str:
    points = compute_best_so_far(event_log, search.mode)
    if not points:
        return "<p>No trial has come to a rung with a finite value.</p>"
    return draw_step_curve(points, across="tokens of all trials", up=search.metric)


def _plot_parallel_coordinates(search: SearchConfig, event_log: EventLog) -> str:
    order = [
        trial
        for trial in rank_trials(event_log, search.mode)
        if trial.last_rung and math.isfinite(trial.last_rung.value)
    ]
    if not order:
        return "<p>No trial has come to a rung with a finite value.</p>"
    axes = [_build_axis(name, values, order) for name, values in search.search.items()]
    measured = [trial.last_rung.value for trial in order if trial.last_rung]
    low, high = min(measured), max(measured)
    span = high - low or 1.0
    ends = ((0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")) if high > low else ((0.5, f"{low:.4g}"),)
    axes.append(
        ParallelAxis(
            search.metric, [(value - low) / span for value in measured] if high > low else [0.5] * len(order), ends
        )
    )
    strength = [1.0 - position / max(len(order) - 1, 1) for position in range(len(order))]
    return draw_parallel_coordinates(
        axes, strength, [f"{trial.name}: {format_point(trial.parameters)}" for trial in order]
    )


def _build_axis(name: str, values: ParameterDistribution, trials: Sequence[TrialRecord]) -> ParallelAxis:
    """Return the axis of a key with each trial's position on it."""
    if values.choice is not None:
        names = [point_key({"": choice}) for choice in values.boundary_values]
        places = {text: (index + 0.5) / len(names) for index, text in enumerate(names)}
        ticks = tuple((places[text], text[len('{"": ') : -1]) for text in names)
        return ParallelAxis(name, [places[point_key({"": trial.parameters[name]})] for trial in trials], ticks)
    low, high = values.range_bounds
    scale = math.log if values.loguniform is not None else float
    at = [(scale(trial.parameters[name]) - scale(low)) / (scale(high) - scale(low)) for trial in trials]
    return ParallelAxis(name, at, ((0.0, f"{low:g}"), (1.0, f"{high:g}")))


def _plot_importance(search: SearchConfig, event_log: EventLog) -> str:
    found = compute_importance(search, event_log)
    if not found:
        return "<p>Too few trials differ at one rung to tell.</p>"
    return draw_bar_chart(sorted(found.items(), key=lambda item: -item[1]))


def _format_trials_table(search: SearchConfig, event_log: EventLog) -> str:
    heads = ["trial", "state", search.metric, "step", "tokens", *search.search, "error"]
    winner = find_best_trial(event_log, search.mode)
    rows = [_format_trial_row(search, trial, won=trial is winner) for trial in rank_trials(event_log, search.mode)]
    numbers = {search.metric, "step", "tokens"}
    head = "".join(f"<th{' class=number' if name in numbers else ''}>{_escape_html(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _format_trial_row(search: SearchConfig, trial: TrialRecord, *, won: bool) -> str:
    last = trial.last_rung
    cells = [f"<td>{trial.name}</td><td>{'unfinished' if trial.state == 'begun' else trial.state}</td>"]
    shown_numbers = (f"{last.value:.5g}", f"{last.step:,}", f"{last.tokens:,}") if last else ("", "", "")
    cells += [f"<td class=number>{text}</td>" for text in shown_numbers]
    cells += [
        f"<td>{_escape_html(format_point({name: trial.parameters[name]}).partition(' = ')[2])}</td>"
        for name in search.search
    ]
    cells.append(f"<td>{_escape_html(trial.error or '')}</td>")
    return f"<tr{' class=best' if won else ''}>{''.join(cells)}</tr>"


@dataclass(frozen=True)
class ParallelAxis:
    """Axis of parallel coordinates."""

    name: str
    places: Sequence[float]
    """Position of each line, from 0 (bottom) to 1 (top)."""
    ticks: Sequence[Tick]


def draw_step_curve(points: Sequence[tuple[float, float]], across: str, up: str) -> str:
    """Draw a value that changes in steps."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    right = max(xs) or 1.0
    low, high = min(ys), max(ys)
    margin = (high - low) * 0.1 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin

    def scale_point(x: float, y: float) -> tuple[float, float]:
        wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + x / right * wide, _TOP + (high - y) / (high - low) * tall

    path, before = [], None
    for x, y in points:
        if before is not None:
            path.append(scale_point(x, before))
        path.append(scale_point(x, y))
        before = y
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in path)
    dots = "".join(
        f'<circle cx="{scale_point(x, y)[0]:.1f}" cy="{scale_point(x, y)[1]:.1f}" r="4" fill="var(--mark)">'
        f"<title>{y:.5g} after {x:,.0f} tokens</title></circle>"
        for x, y in points[:-1] or points
    )
    frame = [_draw_grid_line(scale_point(0, y)[1], f"{y:.4g}") for y in _compute_ticks(low, high)]
    frame += [
        _draw_text(scale_point(x, 0)[0], _HEIGHT - 24, _format_count(x), "middle", "dim")
        for x in _compute_ticks(0.0, right)
    ]
    frame.append(_draw_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 6, across, "middle"))
    frame.append(_draw_text(4, 12, up))
    stroke = 'fill="none" stroke="var(--mark)" stroke-width="2"'
    return _wrap_svg(_HEIGHT, f'{"".join(frame)}<polyline class="plot" points="{line}" {stroke}/>{dots}')


def draw_parallel_coordinates(axes: Sequence[ParallelAxis], strength: Sequence[float], titles: Sequence[str]) -> str:
    """Draw parallel coordinates: a line per trial, the weakest first, so that the strongest is on top."""
    top, bottom = _TOP + 12, _HEIGHT - 14
    xs = [_LEFT + 60 + number * (_WIDTH - 200) / max(len(axes) - 1, 1) for number in range(len(axes))]

    def scale_y(place: float) -> float:
        return bottom - place * (bottom - top)

    lines = []
    for number in sorted(range(len(strength)), key=lambda number: strength[number]):
        points = " ".join(f"{x:.1f},{scale_y(axis.places[number]):.1f}" for x, axis in zip(xs, axes, strict=True))
        looks = f'stroke-width="{1 + 2 * strength[number]:.1f}" stroke-opacity="{0.15 + 0.75 * strength[number]:.2f}"'
        title = html.escape(titles[number])
        lines.append(f'<polyline class="plot" points="{points}" fill="none" stroke="var(--mark)" {looks}>')
        lines.append(f"<title>{title}</title></polyline>")
    frame = []
    for x, axis in zip(xs, axes, strict=True):
        frame.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        frame.append(_draw_text(x, top - 16, axis.name, "middle"))
        frame += [_draw_text(x + 6, scale_y(place) + 4, text, "start", "dim") for place, text in axis.ticks]
    return _wrap_svg(_HEIGHT, "".join([*lines, *frame]))


def draw_bar_chart(values: Sequence[tuple[str, float]]) -> str:
    """Draw a bar from 0 to 1 for each name."""
    height, wide = 26, _WIDTH - 330
    parts = []
    for number, (name, value) in enumerate(values):
        y = 6 + number * height
        parts.append(_draw_text(220, y + 13, name, "end"))
        size = f'width="{max(value * wide, 1):.1f}" height="{height - 8}"'
        parts.append(f'<rect class="plot" x="230" y="{y}" {size} fill="var(--mark)"/>')
        parts.append(_draw_text(238 + value * wide, y + 13, f"{value:.0%}", "start", "dim"))
    return _wrap_svg(len(values) * height + 10, "".join(parts))


def _compute_ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * part / 4 for part in range(5)]


def _draw_grid_line(y: float, text: str) -> str:
    line = f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return line + _draw_text(_LEFT - 8, y + 4, text, "end", "dim")


def _draw_text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{html.escape(text)}</text>'


def _format_count(number: float) -> str:
    """Format a count with its order of magnitude: 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _wrap_svg(height: int, content: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{content}</svg>'
