"""Package of a Ray job: the code of the current folder without large files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.builder import get_cache_directory
from llm_training_toolkit.data.sources.files import COMPRESSION_SUFFIXES, RECORD_FILE_FORMATS
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.launch.ray.private_api import MAX_PACKAGE_BYTES, visit_packaged_paths

# Runs and weights are on storage that the cluster sees.
_ALWAYS_EXCLUDED = ["/runs/", ".venv/", "venv/", ".git/", "__pycache__/", "*.safetensors", "*.egg-info/"]
_RECORD_PATTERNS = [
    f"*{kind}{packed}" for kind in RECORD_FILE_FORMATS for packed in ("", *sorted(COMPRESSION_SUFFIXES))
]
_MAX_LISTED = 3  # largest entries named when the folder is too large
_ZIP_ENTRY_BYTES = 100  # per file, besides its content and twice its name: the zip file is not compressed


def get_exclude_patterns(config: Config, folder: Path) -> list[str]:
    """Return gitignore patterns of files excluded in addition to those of .rayignore and .gitignore.

    Excluded are runs, prepared data, weights and record files. Record files that the run names by a path inside the
    folder are packed, because the job finds them nowhere else.
    """
    written = [Path(config.run.dir).expanduser(), get_cache_directory(config)] if not is_uri(config.run.dir) else []
    inside = [path.relative_to(folder) for path in written if path.is_absolute() and path.is_relative_to(folder)]
    sources = [*config.data.sources, *config.data.eval.sources]
    read = [source.path for source in sources if not is_uri(source.path) and not Path(source.path).is_absolute()]
    named = [f"!{pattern}" for path in map(str, map(Path, read)) for pattern in _build_path_patterns(path)]
    return [*_RECORD_PATTERNS, *named, *_ALWAYS_EXCLUDED, *(f"/{path.as_posix()}/" for path in inside if path.parts)]


def _build_path_patterns(path: str) -> list[str]:
    return ["*"] if path == "." else [f"/{path}", f"/{path}/**"]


def check_package_size(folder: Path, left_out: list[str]) -> str:
    """Return the size of a job's package as text; `left_out` comes from `get_exclude_patterns`.

    Raises PlanError with the largest entries, before anything is packed, if Ray's job server would refuse the upload:
    the server itself answers with a traceback.
    """
    sizes: Counter[str] = Counter()
    files = packed = 0

    def add_file_size(path: Path) -> None:
        nonlocal files, packed
        inside = path.relative_to(folder)
        packed += _ZIP_ENTRY_BYTES + 2 * len(str(inside).encode())
        if path.is_file():
            files += 1
            sizes[inside.parts[0]] += path.stat().st_size

    visit_packaged_paths(folder, left_out, add_file_size)
    total = sum(sizes.values())
    packed += total
    carried = f"{files:,} {'file' if files == 1 else 'files'}, {_format_bytes(total)}"
    if packed >= MAX_PACKAGE_BYTES:
        largest = ", ".join(f"{name} {_format_bytes(size)}" for name, size in sizes.most_common(_MAX_LISTED))
        raise PlanError(
            f"the current folder holds {carried}, a job carries less than "
            f"{_format_bytes(MAX_PACKAGE_BYTES)} of code. Largest: {largest}. Keep data where the cluster reads it, or "
            "name what stays here in .rayignore (written like .gitignore)"
        )
    return carried


def _format_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
