"""What travels with a job: the code of the current folder, and nothing large."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.data.prepare.builder import cache_of
from llm_training_toolkit.data.sources.files import COMPRESSED, RECORDS
from llm_training_toolkit.errors import PlanError

_NEVER = ["/runs/", ".venv/", "venv/", ".git/", "__pycache__/", "*.safetensors", "*.egg-info/"]
"""Runs and weights lie on storage that the cluster sees."""
_DATA = [f"*{kind}{packed}" for kind in RECORDS for packed in ("", *sorted(COMPRESSED))]
_LARGEST = 3
"""Entries that are named when the folder is too large."""
_OF_AN_ENTRY = 100
"""Bytes of the zip file for each file, besides its content and twice its name: it is not compressed."""


def excluded(config: Config, folder: Path) -> list[str]:
    """What is never packed, besides what .rayignore and .gitignore name, as patterns of gitignore.

    Runs, prepared data, weights, and files of records but those which the run names by a path inside the folder: the
    job finds these nowhere else.
    """
    written = [Path(config.run.dir).expanduser(), cache_of(config)] if not is_address(config.run.dir) else []
    inside = [path.relative_to(folder) for path in written if path.is_absolute() and path.is_relative_to(folder)]
    sources = [*config.data.sources, *config.data.eval.sources]
    read = [source.path for source in sources if not is_address(source.path) and not Path(source.path).is_absolute()]
    named = [f"!{pattern}" for path in map(str, map(Path, read)) for pattern in _a_path(path)]
    return [*_DATA, *named, *_NEVER, *(f"/{path.as_posix()}/" for path in inside if path.parts)]


def _a_path(path: str) -> list[str]:
    return ["*"] if path == "." else [f"/{path}", f"/{path}/**"]


def what_travels(folder: Path, left_out: list[str]) -> str:
    """How much a job from this folder carries, in words; `left_out` as `excluded` gives it.

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
    _dir_travel(folder, [_get_excludes(folder, left_out)], add, include_gitignore=True)
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
