"""Plots as SVG text: a curve in steps, parallel coordinates, bars. Pure."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 960, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 28, 44
Tick = tuple[float, str]
"""A place from 0 to 1, and what stands there."""


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
