"""Files of JSON objects, one a line, whose writer may have been killed in the middle of a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_TAIL = 131_072  # bytes read from the end, about two hundred steps


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file's complete lines; a missing file is empty."""
    return _parse_lines(path.read_bytes().split(b"\n") if path.is_file() else ())


def read_newest_rows(metrics: Path) -> Iterator[dict[str, Any]]:
    """Yield the last complete lines of metrics.jsonl; skip lines that are no row of metrics."""
    if not metrics.is_file():
        return
    with metrics.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        lines = file.read().split(b"\n")
    yield from filter(is_metrics_row, _parse_lines(lines[1:] if size > _TAIL else lines))


def is_metrics_row(row: dict[str, Any]) -> bool:
    """Return whether a row has a step, and numbers as values."""
    return isinstance(row.get("step"), int) and all(isinstance(value, int | float) for value in row.values())


def _parse_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def terminate_last_line(path: Path) -> None:
    """End the partial line of a killed writer, so that the next one is not appended to it."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
