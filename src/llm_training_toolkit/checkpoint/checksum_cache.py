"""Checksums of large files from an earlier start, for as long as a file has not been touched.

A file counts as untouched if its path, size, inode, and times of the last write and change are those of the cached
entry. The time of change catches a copy that keeps the time of the last write.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint.manifest import compute_sha256
from llm_training_toolkit.runs.atomic_write import write_atomically

# Of a file written less than two seconds before it is read nothing is kept: some file systems count time in steps of
# that length (FAT; NFS and ext3 one second), and a second write within the step would leave the same times.
_MIN_AGE_SECONDS = 2.0


def read_sha256(path: Path, cache: Path) -> str:
    """Return a file's SHA-256: the cached one of an untouched file, or computed and kept in `cache`.

    An unreadable or unwritable cache costs the computation alone.
    """
    started, before = time.time(), path.stat()
    marks = _describe_file(path, before)
    entry = cache / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"
    kept = _read_entry(entry)
    if kept.get("file") == marks and isinstance(kept.get("sha256"), str):
        return str(kept["sha256"])
    computed = compute_sha256(path)
    is_settled = started - max(before.st_mtime, before.st_ctime) > _MIN_AGE_SECONDS
    if is_settled and _describe_file(path, path.stat()) == marks:
        with suppress(OSError):
            write_atomically(entry, json.dumps({"file": marks, "sha256": computed}))
    return computed


def _describe_file(path: Path, status: os.stat_result) -> dict[str, Any]:
    return {
        "path": str(path.resolve()),
        "size": status.st_size,
        "inode": status.st_ino,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
    }


def _read_entry(entry: Path) -> dict[str, Any]:
    try:
        values = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
