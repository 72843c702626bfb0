"""Package of a Ray job: the code of the current folder without large files and secrets."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.data.prepare.dataset_info import get_cache_directory
from llm_training_toolkit.data.sources.files import COMPRESSION_SUFFIXES, RECORD_FILE_FORMATS
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.launch.ray.private_api import MAX_PACKAGE_BYTES, visit_packaged_paths

# Runs and weights are on storage that the cluster sees.
_ALWAYS_EXCLUDED = ["/runs/", ".venv/", "venv/", ".git/", "__pycache__/", "*.safetensors", "*.egg-info/"]
# Every job of a cluster can read the packages of the others.
_SECRET_PATTERNS = [
    *(".?*", "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.gpg", "*.asc"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "kubeconfig*", "credentials", "credentials.*"),
    *("secrets", "secrets.*", "*service-account*.json", "*service_account*.json", "client_secret*.json"),
]
_RECORD_PATTERNS = [
    f"*{kind}{packed}" for kind in RECORD_FILE_FORMATS for packed in ("", *sorted(COMPRESSION_SUFFIXES))
]
_MAX_LISTED = 3  # largest entries named when the folder is too large
_ZIP_ENTRY_BYTES = 100  # per file, besides its content and twice its name: the zip file is not compressed


def get_exclude_patterns(config: Config, folder: Path) -> list[str]:
    """Return gitignore patterns of files excluded in addition to those of .rayignore and .gitignore.

    Excluded are runs, prepared data, weights, record files, hidden files and files named like keys. Record files that
    the run names by a path inside the folder are packed, because the job finds them nowhere else.
    """
    written = [Path(config.run.dir).expanduser(), get_cache_directory(config)] if not is_uri(config.run.dir) else []
    inside = [path.relative_to(folder) for path in written if path.is_absolute() and path.is_relative_to(folder)]
    sources = [*config.data.sources, *config.data.eval.sources]
    read = [source.path for source in sources if not is_uri(source.path) and not Path(source.path).is_absolute()]
    named = [f"!{pattern}" for path in map(str, map(Path, read)) for pattern in _build_path_patterns(path)]
    own = [f"/{path.as_posix()}/" for path in inside if path.parts]
    return [*_RECORD_PATTERNS, *named, *_ALWAYS_EXCLUDED, *own, *_SECRET_PATTERNS]


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


def find_excluded_secrets(folder: Path, left_out: list[str]) -> list[str]:
    """Return the hidden and key files that stay here though nothing but `_SECRET_PATTERNS` excludes them, relative.

    Of a hidden directory the directory is named, not its files.
    """
    others = [pattern for pattern in left_out if pattern not in _SECRET_PATTERNS]
    secret = _list_packaged_files(folder, others) - _list_packaged_files(folder, left_out)
    return sorted({_get_hidden_directory(path) or path for path in secret})


def _get_hidden_directory(path: str) -> str | None:
    """Return the outermost hidden directory that holds a file, with a slash, or None for a file in none."""
    parts = path.split("/")[:-1]
    hidden = next((number for number, part in enumerate(parts) if part.startswith(".")), None)
    return None if hidden is None else "/".join(parts[: hidden + 1]) + "/"


def check_no_shadowing_modules(folder: Path, left_out: list[str]) -> None:
    """Raise PlanError for packed modules that every process of the job would import in place of Python's own.

    Ray puts the folder before everything else on the path of a job's processes. `test` is no module that they import.
    """
    own = sys.stdlib_module_names - set(sys.builtin_module_names) - {"test"}
    packed = [path for path in _list_packaged_files(folder, left_out) if path.endswith(".py")]
    modules = sorted(path for path in packed if path.removesuffix(".py").removesuffix("/__init__") in own)
    if modules:
        raise PlanError(
            f"{', '.join(modules)} in the current folder: every process of the job would import it in place of "
            "Python's own module of that name. Submit from another folder, or name it in .rayignore"
        )


def _list_packaged_files(folder: Path, left_out: list[str]) -> set[str]:
    """Return the relative paths of the files that Ray packs."""
    found: list[Path] = []
    visit_packaged_paths(folder, left_out, found.append)
    return {path.relative_to(folder).as_posix() for path in found if path.is_file()}


def _format_bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
