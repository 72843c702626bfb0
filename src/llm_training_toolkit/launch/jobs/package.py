"""What travels with a job: the code of the current folder, and nothing large."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

from llm_training_toolkit.errors import PlanError

EXCLUDED = ["/runs/", ".venv/", "venv/", ".git/", "__pycache__/", "*.safetensors", "*.egg-info/"]
"""Never packed, besides what .rayignore and .gitignore name: runs and weights lie on storage that the cluster sees."""
_LARGEST = 3
"""Entries that are named when the folder is too large."""


def what_travels(folder: Path) -> str:
    """How much a job from this folder carries, in words.

    Raises PlanError where it is more than Ray takes: with what is largest, before anything is packed.
    """
    sizes: Counter[str] = Counter()
    files = 0

    def add(path: Path) -> None:
        nonlocal files
        if path.is_file():
            files += 1
            sizes[path.relative_to(folder).parts[0]] += path.stat().st_size

    # Ray's own walk, so that what is counted is what it will pack.
    _dir_travel(folder, [_get_excludes(folder, EXCLUDED)], add, include_gitignore=True)
    total = sum(sizes.values())
    carried = f"{files:,} {'file' if files == 1 else 'files'}, {_in_words(total)}"
    if total >= GCS_STORAGE_MAX_SIZE:
        largest = ", ".join(f"{name} {_in_words(size)}" for name, size in sizes.most_common(_LARGEST))
        raise PlanError(
            f"the current folder holds {carried}, a job carries less than "
            f"{_in_words(GCS_STORAGE_MAX_SIZE)} of code. Largest: {largest}. Keep data where the cluster reads it, or "
            "name what stays here in .rayignore (written like .gitignore)"
        )
    return carried


def _in_words(size: float) -> str:
    """Bytes as kB, MB or GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
