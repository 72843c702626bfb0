"""Attempts of a run: one record for each start of its workers."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llm_training_toolkit.runs.directory import RunDirectory, write_atomically


def begin_attempt(run: RunDirectory, facts: Mapping[str, Any]) -> int:
    """Take the next attempt number, by an exclusive create so that no two starts share one."""
    run.attempts_dir.mkdir(parents=True, exist_ok=True)
    number = 1 + find_last_attempt(run)
    for before in range(number - 1, 0, -1):
        if not _close_attempt(run, before):
            break  # those before it were closed when it began
    while True:
        path = run.attempts_dir / f"{number:04d}.json"
        with suppress(FileExistsError), path.open("x"):
            break
        number += 1
    record = {"attempt": number, "state": "running", "started": time.time(), **facts}
    write_atomically(path, json.dumps(record, indent=1))
    return number


def find_last_attempt(run: RunDirectory) -> int:
    """The highest attempt number taken; 0 before the first."""
    return max((int(path.stem) for path in run.attempts_dir.glob("[0-9]*.json")), default=0)


def read_attempt_record(run: RunDirectory, attempt: int) -> dict[str, Any]:
    """What the file of an attempt says; empty where there is none, or it was cut short."""
    try:
        record: dict[str, Any] = json.loads((run.attempts_dir / f"{attempt:04d}.json").read_text())
    except (OSError, ValueError):
        return {}
    return record


def _close_attempt(run: RunDirectory, attempt: int) -> bool:
    """An attempt that does not say how it ended when the next one begins was killed; whether it was this one."""
    there = (run.attempts_dir / f"{attempt:04d}.json").exists()
    if not there or read_attempt_record(run, attempt).get("state", "running") != "running":
        return False
    with suppress(OSError):
        end_attempt(run, attempt, "lost")
    return True


def end_attempt(run: RunDirectory, attempt: int, state: str, **facts: object) -> None:
    """Record how an attempt ended: `finished`, `stopped`, `failed` or `lost` (killed)."""
    path = run.attempts_dir / f"{attempt:04d}.json"
    # One that was cut short, by a kill or a full disk as it began, has nothing else to say.
    record = {"attempt": attempt} | read_attempt_record(run, attempt) | {"state": state, "ended": time.time(), **facts}
    write_atomically(path, json.dumps(record, indent=1))


def update_attempt(run: RunDirectory, attempt: int, **facts: object) -> None:
    """Add to what the file of an attempt says."""
    path = run.attempts_dir / f"{attempt:04d}.json"
    write_atomically(path, json.dumps(json.loads(path.read_text()) | facts, indent=1))


def fail_attempt(run: RunDirectory, attempt: int, error: str) -> None:
    """Record that an attempt failed; of several ranks the first to say so names the cause."""
    if read_attempt_record(run, attempt).get("state") != "failed":
        end_attempt(run, attempt, "failed", error=error)


def mark_out_of_memory(run: RunDirectory, attempt: int) -> None:
    """Leave a mark that no other rank's failure can take back; the next attempt takes less."""
    (run.attempts_dir / f"{attempt:04d}.out_of_memory").touch()


def has_run_out_of_memory(run: RunDirectory, attempt: int) -> bool:
    """Whether any rank of an attempt left that mark."""
    return (run.attempts_dir / f"{attempt:04d}.out_of_memory").exists()
