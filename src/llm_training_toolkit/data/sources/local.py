"""Local file listing: directories, globs, and Python's standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from llm_training_toolkit.data.sources.files import (
    HIDDEN_PREFIX,
    SourceFile,
    SourceRoot,
    has_wildcards,
    is_wanted_directory,
    split_pattern,
)
from llm_training_toolkit.monitoring.logs import DRIVER_LOGGER

STANDARD_LIBRARY = "python:stdlib"
_EXCLUDED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def find_standard_library_files() -> Iterator[SourceFile]:
    """Yield the .py files of the running Python's standard library, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return (file for file in _walk_files(root, _EXCLUDED_DIRECTORIES) if file.relative.endswith(".py"))


def find_directory_files(path: Path) -> Iterator[SourceFile]:
    """Yield the files below a directory, except hidden ones and unwanted directories (`is_wanted_directory`)."""
    return _walk_files(path)


def find_matching_files(path: Path) -> Iterator[SourceFile]:
    """Yield the file at a path, or the files that match a glob; hidden ones only if the pattern names them."""
    if path.exists():
        yield SourceFile(SourceRoot(str(path.parent)), path.name)
    elif has_wildcards(str(path)):
        yield from _match_glob(path)


def select_files_inside(files: Iterable[SourceFile]) -> Iterator[SourceFile]:
    """Yield the files that lie below the root of their source, symbolic links resolved; log how many do not."""
    inside: dict[str, bool] = {}  # by directory
    left_out = 0
    for file in files:
        path, top = Path(file.filesystem_path), os.path.realpath(file.root.path)
        parent = str(path.parent)
        if parent not in inside:
            inside[parent] = Path(os.path.realpath(parent)).is_relative_to(top)
        if inside[parent] and (not path.is_symlink() or Path(os.path.realpath(path)).is_relative_to(top)):
            yield file
        else:
            left_out += 1
    if left_out:
        DRIVER_LOGGER.warning(
            "data.sources: %d links to files outside of %s are left out; follow_symlinks: true reads them",
            left_out,
            top,
        )


def _walk_files(top: Path, without: frozenset[str] = frozenset()) -> Iterator[SourceFile]:
    root = SourceRoot(str(top), top.resolve().name)
    checkouts = {"": ""}
    for folder, below, names in os.walk(top, onerror=_raise_walk_error):
        here = Path(folder)
        relative = "" if here == top else here.relative_to(top).as_posix()
        checkout = checkouts.pop(relative)
        if relative and ".git" in (*below, *names):  # .git is a file in worktrees and submodules
            checkout = relative
        # Pruned in place, so that os.walk skips them.
        below[:] = [
            name
            for name in below
            if is_wanted_directory(name) and name not in without and not _is_virtual_environment(here / name)
        ]
        prefix = relative and f"{relative}/"
        checkouts |= {prefix + name: checkout for name in below}
        for name in names:
            if not name.startswith(HIDDEN_PREFIX) and (here / name).is_file():
                yield SourceFile(root, prefix + name, checkout)


def _raise_walk_error(error: OSError) -> None:
    """Raise the error. os.walk silently skips unlistable directories by default."""
    raise error


def _is_virtual_environment(folder: Path) -> bool:
    try:
        return (folder / "pyvenv.cfg").exists()
    except PermissionError:
        return False  # reported when it is listed


def _match_glob(pattern: Path) -> Iterator[SourceFile]:
    fixed, rest = split_pattern(pattern.as_posix())
    rest += "/*" if rest.endswith("**") else ""  # pathlib's `**` matches only directories
    top = Path(fixed)
    root = SourceRoot(fixed, top.resolve().name)
    hidden_wanted = any(part.startswith(HIDDEN_PREFIX) for part in rest.split("/"))
    for path in set(top.glob(rest)):
        name = path.relative_to(top)
        if path.is_file() and (hidden_wanted or not any(part.startswith(HIDDEN_PREFIX) for part in name.parts)):
            yield SourceFile(root, name.as_posix(), _find_git_checkout(top, name))


def _find_git_checkout(top: Path, name: Path) -> str:
    """Return the nearest git checkout above a file and below the top, empty if there is none."""
    above = list(name.parents)[:-1]
    return next((folder.as_posix() for folder in above if (top / folder / ".git").exists()), "")
