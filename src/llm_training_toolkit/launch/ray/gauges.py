"""Gauges of a run in Ray's exporter, which Prometheus scrapes on every node."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from ray.util.metrics import Gauge

_PREFIX = "ltt_"  # Ray puts ray_ before it


def build_gauge_exporter(run: str) -> Callable[[Mapping[str, float]], None]:
    """Return a function that sets gauges to scalars by metric name, with the run's name as a tag."""
    gauges: dict[str, Gauge] = {}

    def export(values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            if metric not in gauges:
                gauges[metric] = Gauge(get_gauge_name(metric), f"{metric} of the newest step", tag_keys=("run",))
            gauges[metric].set(value, tags={"run": run})

    return export


def get_gauge_name(metric: str) -> str:
    """Return the gauge's name of a metric; Prometheus allows letters, digits and underscores."""
    return _PREFIX + re.sub(r"\W", "_", metric)
