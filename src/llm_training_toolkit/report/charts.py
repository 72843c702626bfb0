"""Line charts as coordinates for the page's template, which draws them as SVG. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
WIDTH, HEIGHT = 520, 220  # of the drawing area, in units of the SVG
_MAX_POINTS = 400  # of a line: more than one for each pixel of a chart shows nothing new
_MAX_HINTS = 60  # of a line: points that show their value under the pointer
_TICKS = 5
_SMALLEST = 1e-300  # smaller values, and larger than its inverse, leave the range of floats when an axis is divided


@dataclass(frozen=True)
class Tick:
    """Label of an axis at a coordinate of the SVG."""

    at: float
    label: str


@dataclass(frozen=True)
class Hint:
    """Point that shows its value under the pointer."""

    x: float
    y: float
    label: str


@dataclass(frozen=True)
class ChartLine:
    """Line of one run."""

    name: str
    number: int
    """Number of the run, from 0: its colour."""
    path: str
    """Attribute `d` of an SVG path."""
    hints: tuple[Hint, ...]


@dataclass(frozen=True)
class Chart:
    """Chart with one line for each run that has values."""

    title: str
    across: str
    lines: tuple[ChartLine, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def build_chart(title: str, across: str, series: Sequence[tuple[str, Sequence[Point]]]) -> Chart | None:
    """Build a chart of (run, points); None if no run has a finite point."""
    finite = [[point for point in points if all(map(_is_drawable, point))] for _, points in series]
    every = [point for points in finite for point in points]
    if not every:
        return None
    x_ticks, (left, right) = _choose_ticks([x for x, _ in every])
    y_ticks, (low, high) = _choose_ticks([y for _, y in every], padded=True)

    def place(point: Point) -> Point:
        x, y = point
        return WIDTH * (x - left) / (right - left), HEIGHT * (high - y) / (high - low)

    lines = tuple(
        ChartLine(
            name, number, _format_path([place(point) for point in thin_out(points)]), tuple(_iter_hints(points, place))
        )
        for number, ((name, _), points) in enumerate(zip(series, finite, strict=True))
        if points
    )
    return Chart(
        title,
        across,
        lines,
        tuple(Tick(place((value, low))[0], format_number(value)) for value in x_ticks),
        tuple(Tick(place((left, value))[1], format_number(value)) for value in y_ticks),
    )


def _is_drawable(value: float) -> bool:
    """Return whether a value has a place on an axis: it is finite, and so is a hundred times its distance to others."""
    return math.isfinite(value) and (value == 0 or _SMALLEST < abs(value) < 1 / _SMALLEST)


def thin_out(points: Sequence[Point]) -> list[Point]:
    """Return at most about 400 points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    size = 2 * len(points) / _MAX_POINTS
    kept = [points[0]]
    for number in range(_MAX_POINTS // 2):
        stretch = points[int(number * size) : int((number + 1) * size)]
        kept += sorted({min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])})
    return [*kept, points[-1]]


def format_number(value: float) -> str:
    """Format a number with up to four digits: 0, 2.5, 1,200, 1.5M, 3e-04."""
    size = abs(value)
    if size >= 1e6:
        return next(f"{value / unit:.4g}{name}" for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if size >= unit)
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2g}" if 0 < size < 0.001 else f"{value:.4g}"


def _choose_ticks(values: Sequence[float], *, padded: bool = False) -> tuple[list[float], Point]:
    """Return round numbers for an axis, and the ends of the axis; `padded` leaves some room around the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    if padded:
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)
    step = _round_up((high - low) / _TICKS)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)], (low, high)


def _round_up(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def _format_path(points: Sequence[Point]) -> str:
    if len(points) == 1:  # a round cap makes a dot of a line without length
        points = [*points, *points]
    return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _iter_hints(points: Sequence[Point], place: Callable[[Point], Point]) -> Iterator[Hint]:
    for point in points[:: -(-len(points) // _MAX_HINTS)]:
        yield Hint(*place(point), f"{format_number(point[0])}: {format_number(point[1])}")
