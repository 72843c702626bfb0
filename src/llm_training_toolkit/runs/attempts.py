"""Attempts of a run: one record for each start of its workers.

The first attempt draws the run's id, which the others and the checkpoints carry. A process whose run was removed and
begun anew recognizes by it that the directory is no longer its own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory


def begin_attempt(run: RunDirectory, fields: Mapping[str, Any]) -> int:
    """Take the next attempt number with an exclusive create, so that no two starts share one. Raises OSError."""
    while True:
        run.storage.refresh_directory(run.attempts_dir)
        number = _create_attempt_record(run, fields)
        path = run.attempts_dir / f"{number:04d}.json"
        if run.storage.claim_file(path):
            return number
        path.unlink()


def _create_attempt_record(run: RunDirectory, fields: Mapping[str, Any]) -> int:
    """Write the record of the next attempt into the directory and return its number."""
    run.attempts_dir.mkdir(parents=True, exist_ok=True)
    number = 1 + find_last_attempt(run)
    for earlier_number in range(number - 1, 0, -1):
        if not _close_attempt(run, earlier_number):
            break  # earlier ones were closed when this one began
    while True:
        path = run.attempts_dir / f"{number:04d}.json"
        with suppress(FileExistsError), path.open("x"):
            break
        number += 1
    run_id = _find_run_id(run, before_attempt=number) or uuid.uuid4().hex
    record = {"attempt": number, "run_id": run_id, "state": "running", "started": time.time(), **fields}
    write_atomically(path, json.dumps(record, indent=1))
    return number


def find_last_attempt(run: RunDirectory) -> int:
    """Return the highest attempt number, 0 before the first. Other files are ignored."""
    numbers = (int(path.stem) for path in run.attempts_dir.glob("[0-9]*.json") if path.stem.isdecimal())
    return max(numbers, default=0)


def read_attempt_record(run: RunDirectory, attempt: int) -> dict[str, Any]:
    """Return the record of an attempt; empty if it is missing or truncated."""
    try:
        record = json.loads((run.attempts_dir / f"{attempt:04d}.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _find_run_id(run: RunDirectory, before_attempt: int) -> str:
    """Return the id of the run from the newest record that has one, "" for a new run."""
    records = (read_attempt_record(run, number) for number in range(before_attempt - 1, 0, -1))
    return next((str(record["run_id"]) for record in records if record.get("run_id")), "")


def find_takeover(run: RunDirectory, attempt: int, run_id: str) -> str | None:
    """Return how a run was taken from the attempt with this id (newer attempt, begun anew, removed), else None.

    Without an id only a newer attempt is found.
    """
    newest, found = find_last_attempt(run), read_attempt_record(run, attempt).get("run_id", "")
    if newest > attempt:
        return f"attempt {newest} has taken over this run"
    if not run_id or found == run_id:
        return None
    if found:
        return "the run was removed and begun anew"
    # A record that is there but cannot be read now says nothing of the run.
    is_there = (run.attempts_dir / f"{attempt:04d}.json").exists()
    return None if is_there else "the run was removed while it was at work"


def _close_attempt(run: RunDirectory, attempt: int) -> bool:
    """Mark an attempt as `lost` if it has no end state, because it was killed. Return whether that was so."""
    there = (run.attempts_dir / f"{attempt:04d}.json").exists()
    if not there or read_attempt_record(run, attempt).get("state", "running") != "running":
        return False
    with suppress(OSError):
        end_attempt(run, attempt, "lost")
    return True


def end_attempt(run: RunDirectory, attempt: int, state: str, **fields: object) -> None:
    """Record the end state of an attempt: `finished`, `stopped`, `drained`, `failed` or `lost` (killed)."""
    path = run.attempts_dir / f"{attempt:04d}.json"
    # A record truncated by a kill or a full disk at its start provides only the number.
    record = {"attempt": attempt} | read_attempt_record(run, attempt) | {"state": state, "ended": time.time(), **fields}
    write_atomically(path, json.dumps(record, indent=1))


def update_attempt(run: RunDirectory, attempt: int, **fields: object) -> None:
    """Add facts to the record of an attempt."""
    path = run.attempts_dir / f"{attempt:04d}.json"
    write_atomically(path, json.dumps(json.loads(path.read_text()) | fields, indent=1))


def fail_attempt(run: RunDirectory, attempt: int, error: str) -> None:
    """Record that an attempt failed; the first of several ranks names the cause."""
    if read_attempt_record(run, attempt).get("state") != "failed":
        end_attempt(run, attempt, "failed", error=error)


def mark_out_of_memory(run: RunDirectory, attempt: int) -> None:
    """Create a marker file, which another rank's failure cannot overwrite; the next attempt uses less memory."""
    (run.attempts_dir / f"{attempt:04d}.out_of_memory").touch()


def has_run_out_of_memory(run: RunDirectory, attempt: int) -> bool:
    """Return whether a rank of the attempt created that marker."""
    return (run.attempts_dir / f"{attempt:04d}.out_of_memory").exists()
