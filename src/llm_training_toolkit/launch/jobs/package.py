"""What travels with a job: the code of the current folder, and nothing large."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from llm_training_toolkit.errors import PlanError

EXCLUDED = ["/runs/", ".venv/", "venv/", ".git/", "__pycache__/", "*.safetensors", "*.egg-info/"]
"""Never packed, besides what .rayignore and .gitignore name: runs and weights lie on storage that the cluster sees."""
_LARGEST = 3
"""Entries that are named when the folder is too large."""
_OF_AN_ENTRY = 100
"""Bytes of the zip file for each file, besides its content and twice its name: it is not compressed."""


def what_travels(folder: Path) -> str:
    """How much a job from this folder carries, in words.

    Raises PlanError where it is more than Ray's job server takes (it answers a larger upload with a traceback), naming
    what is largest, before anything is packed.
    """
    sizes: Counter[str] = Counter()
    files = packed = 0

    def add(path: Path) -> None:
        nonlocal files, packed
        inside = path.relative_to(folder)
        packed += _OF_AN_ENTRY + 2 * len(str(inside).encode())
        if path.is_file():
            files += 1
            sizes[inside.parts[0]] += path.stat().st_size

    # Ray's own walk, so that what is counted is what it will pack.
    _dir_travel(folder, [_get_excludes(folder, EXCLUDED)], add, include_gitignore=True)
    total = sum(sizes.values())
    packed += total
    carried = f"{files:,} {'file' if files == 1 else 'files'}, {_in_words(total)}"
    if packed >= DASHBOARD_CLIENT_MAX_SIZE:
        largest = ", ".join(f"{name} {_in_words(size)}" for name, size in sizes.most_common(_LARGEST))
        raise PlanError(
            f"the current folder holds {carried}, a job carries less than "
            f"{_in_words(DASHBOARD_CLIENT_MAX_SIZE)} of code. Largest: {largest}. Keep data where the cluster reads "
            "it, or name what stays here in .rayignore (written like .gitignore)"
        )
    return carried


def _in_words(size: float) -> str:
    """Bytes as kB, MB or GB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
