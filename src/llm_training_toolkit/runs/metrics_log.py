"""Reader for the end of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL = 131_072  # bytes read from the end, about two hundred steps


def read_newest_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the last complete lines of metrics.jsonl; skip lines that are no row of metrics."""
    if not metrics.is_file():
        return
    with metrics.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = file.read().split(b"\n")
    for line in lines[1:] if size > _TAIL else lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_metrics_row(row):
            yield row


def _is_metrics_row(row: object) -> bool:
    """Return whether a parsed line has a step, and numbers as values."""
    return (
        isinstance(row, dict)
        and isinstance(row.get("step"), int)
        and all(isinstance(value, int | float) for value in row.values())
    )
