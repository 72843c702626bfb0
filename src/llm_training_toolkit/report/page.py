"""Page of one or several runs: numbers formatted for the template `report.html`.

The page is one file without scripts. Its curves are SVG in the page itself: about 60 kB for a run, where plotly.js
alone has 4.8 MB, and their colours follow the reader's light or dark scheme by CSS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from llm_training_toolkit.evaluation.table import format_metric_value
from llm_training_toolkit.plan import ClusterEstimate
from llm_training_toolkit.plan.text import format_large_number
from llm_training_toolkit.report.charts import HEIGHT, WIDTH, Chart, Point, build_chart, format_number
from llm_training_toolkit.report.collect import AttemptReport, RunReport
from llm_training_toolkit.runs.goodput import GOODPUT_CATEGORIES, GoodputCategory
from llm_training_toolkit.runs.table import format_duration

_CHARTS = {
    "Training loss": "train/loss",
    "Validation loss": "eval/loss",
    "Learning rate": "optim/lr",
    "Gradient norm": "optim/grad_norm",
    "Tokens per second": "perf/tokens_per_second",
    "Memory per device, GB": "perf/memory_gb",
}
_TEMPLATE = "report.html"
_IDLE_FIRST: tuple[GoodputCategory, ...] = ("idle", *GOODPUT_CATEGORIES[:-1])


class Comparison(NamedTuple):
    """One row of the table of runs: (planned, measured) of each run."""

    name: str
    cells: tuple[tuple[str, str], ...]


class Segment(NamedTuple):
    """Part of a bar of the time line, in percent of the run's time."""

    category: str
    left: float
    width: float
    label: str


class AttemptRow(NamedTuple):
    """Row of the time line and of the table of attempts."""

    number: int
    state: str
    started: str
    steps: str
    workers: str
    micro_batch: str
    error: str
    segments: tuple[Segment, ...]


def render_page(runs: Sequence[RunReport], estimates: Sequence[ClusterEstimate | None]) -> str:
    """Render the page of the runs; `estimates` holds the forecast of each run on a cluster, or None."""
    environment = Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        loader=FileSystemLoader(Path(__file__).parent),
    )
    environment.filters |= {
        "number": format_number,
        "metric": lambda value, name: format_metric_value(name, value),
        "bytes": lambda size: f"{size / 1e9:,.3g} GB" if size >= 1e9 else f"{size / 1e6:,.3g} MB",
    }
    return environment.get_template(_TEMPLATE).render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        charts=build_charts(runs),
        chart_size=(WIDTH, HEIGHT),
        comparisons=list(compare_plans(runs, estimates)),
        time_lines=[list(build_attempt_rows(run)) for run in runs],
        goodput=[_format_goodput(run) for run in runs],
        categories=GOODPUT_CATEGORIES,
        written=_format_time(datetime.now(UTC).timestamp()),
    )


def build_charts(runs: Sequence[RunReport]) -> list[Chart]:
    """Build the charts of all metrics that any run has, across steps, or tokens if steps are not comparable."""
    by_tokens = len({run.plan.get("tokens_per_step") for run in runs}) > 1
    across = "tokens" if by_tokens else "step"
    charts = []
    for title, metric in _CHARTS.items():
        series = [(run.name, _scale_steps(run, metric, by_tokens=by_tokens)) for run in runs]
        if chart := build_chart(title, across, series):
            charts.append(chart)
    return charts


def _scale_steps(run: RunReport, metric: str, *, by_tokens: bool) -> list[Point]:
    size = float(run.plan.get("tokens_per_step") or 1) if by_tokens else 1.0
    return [(step * size, value) for step, value in run.get_values(metric)]


def compare_plans(runs: Sequence[RunReport], estimates: Sequence[ClusterEstimate | None]) -> Iterator[Comparison]:
    """Yield the rows of the table that sets the plan of each run beside its measurements."""
    pairs = list(zip(runs, estimates, strict=True))
    for name, compare in _COMPARISONS.items():
        cells = tuple(compare(run, estimate) for run, estimate in pairs)
        if any(planned or measured for planned, measured in cells):
            yield Comparison(name, cells)


def _compare_model(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    plan = run.plan
    if not plan:
        return "", ""
    trained = plan["trainable_parameters"]
    part = "" if trained == plan["parameters"] else f", {format_large_number(trained)} trained"
    return f"{plan['model']}, {format_large_number(plan['parameters'])} parameters{part}, {plan['precision']}", ""


def _compare_batch(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    plan = run.plan
    return (f"{plan['global_batch']:,} sequences of {plan['sequence_length']:,} tokens" if plan else ""), ""


def _compare_steps(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    planned = run.plan.get("steps")
    again = f", {run.history.repeated_steps:,} done again" if run.history.repeated_steps else ""
    return _format_optional(planned, "{:,}"), f"{run.status.step:,}{again}"


def _compare_tokens(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    steps, seen = run.plan.get("steps"), run.get_values("train/tokens")
    planned = format_large_number(steps * run.plan["tokens_per_step"]) if steps else ""
    return planned, format_large_number(seen[-1][1]) if seen else ""


def _compare_time(run: RunReport, estimate: ClusterEstimate | None) -> tuple[str, str]:
    planned = f"{format_duration(3600 * estimate.hours)} of steps" if estimate and estimate.hours is not None else ""
    if estimate and estimate.problems:
        planned = "does not fit that cluster"
    total = sum(run.status.goodput.values())
    steps = f", {format_duration(run.status.goodput['step'])} of steps" if total else ""
    return planned, f"{format_duration(total)}{steps}" if total else ""


def _compare_cost(run: RunReport, estimate: ClusterEstimate | None) -> tuple[str, str]:
    if estimate is None or estimate.cost_usd is None:
        return "", ""
    total = sum(run.status.goodput.values()) / 3600
    return f"${estimate.cost_usd:,.2f}", f"${total * estimate.usd_per_hour:,.2f} at the same price" if total else ""


def _compare_speed(run: RunReport, estimate: ClusterEstimate | None) -> tuple[str, str]:
    planned = f"{run.plan['tokens_per_step'] / estimate.compute_seconds:,.0f}" if estimate and run.plan else ""
    return planned, _format_optional(run.get_median("perf/tokens_per_second"), "{:,.0f} (median)")


def _compare_step_time(run: RunReport, estimate: ClusterEstimate | None) -> tuple[str, str]:
    planned = f"{estimate.compute_seconds:.3g} s" if estimate else ""
    return planned, _format_optional(run.get_median("perf/step_seconds"), "{:.3g} s (median)")


def _compare_compute(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    per_token, speed = run.plan.get("flops_per_token"), run.get_median("perf/tokens_per_second")
    if per_token is None:
        return "", ""
    measured = f"{format_large_number(per_token * speed)} FLOP/s" if speed else ""
    return f"{format_large_number(per_token * run.plan['tokens_per_step'])} FLOP a step", measured


def _compare_memory(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    planned, seen = run.plan.get("memory_gb_per_device"), run.get_values("perf/memory_gb")
    measured = f"{max(value for _, value in seen):.3g} GB{_name_memory(run)}" if seen else ""
    return f"{sum(planned.values()):.3g} GB" if planned else "", measured


def _name_memory(run: RunReport) -> str:
    """Name what the measured memory includes: on a CPU it is that of the process, with Python and torch."""
    ranks = run.attempts[-1].record.get("ranks", ()) if run.attempts else ()
    return " (whole process)" if any(rank.get("device") == "cpu" for rank in ranks) else ""


def _compare_rate(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    seen = [value for _, value in run.get_values("optim/lr")]
    return _format_optional(run.plan.get("lr"), "{:.3g} peak"), f"{max(seen):.3g} peak" if seen else ""


def _compare_loss(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    seen = run.get_values("train/loss")
    return "", f"{seen[-1][1]:.4f} at step {seen[-1][0]:,}" if seen else ""


def _compare_validation(run: RunReport, _: ClusterEstimate | None) -> tuple[str, str]:
    seen = run.get_values("eval/loss")
    if not seen:
        return "", ""
    step, best = min(seen, key=lambda each: each[1])
    note = "" if step == seen[-1][0] else f", best {best:.4f} at step {step:,}"
    return "", f"{seen[-1][1]:.4f} at step {seen[-1][0]:,}{note}"


_COMPARISONS: Mapping[str, Callable[[RunReport, ClusterEstimate | None], tuple[str, str]]] = {
    "model": _compare_model,
    "batch": _compare_batch,
    "steps": _compare_steps,
    "tokens": _compare_tokens,
    "time": _compare_time,
    "time of a step": _compare_step_time,
    "tokens per second": _compare_speed,
    "cost": _compare_cost,
    "computation": _compare_compute,
    "memory per device": _compare_memory,
    "learning rate": _compare_rate,
    "training loss": _compare_loss,
    "validation loss": _compare_validation,
}


def build_attempt_rows(run: RunReport) -> Iterator[AttemptRow]:
    """Yield the rows of the time line. Its axis is the run's accounted time, so that the bars lie end to end."""
    total = sum(sum(attempt.seconds.values()) for attempt in run.attempts)
    left = 0.0
    for attempt in run.attempts:
        segments = []
        for category in _IDLE_FIRST:
            seconds = attempt.seconds.get(category, 0.0)
            if seconds > 0:
                label = f"{category} {format_duration(seconds)}"
                segments.append(Segment(category, 100 * left / total, 100 * seconds / total, label))
                left += seconds
        yield _build_attempt_row(attempt, tuple(segments))


def _build_attempt_row(attempt: AttemptReport, segments: tuple[Segment, ...]) -> AttemptRow:
    record: Mapping[str, Any] = attempt.record
    started, steps = record.get("started"), "none"
    if attempt.first_step is not None:
        steps = f"{attempt.first_step:,} to {attempt.last_step:,}"
    return AttemptRow(
        attempt.number,
        str(record.get("state", "unknown")),
        _format_time(started) if isinstance(started, int | float) else "",
        steps,
        str(record.get("workers", "")),
        str(record.get("micro_batch", "")),
        str(record.get("error", "")),
        segments,
    )


def _format_goodput(run: RunReport) -> list[tuple[str, str, str]]:
    """Return category, duration and share of the run's time."""
    seconds = run.status.goodput
    total = sum(seconds.values())
    return [(name, format_duration(each), f"{each / total:.1%}") for name, each in seconds.items()] if total else []


def _format_optional(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
