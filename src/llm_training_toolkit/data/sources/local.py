"""Finds files on a local disk: below a directory, by a glob, or the standard library of Python."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llm_training_toolkit.data.sources.files import (
    HIDDEN,
    Root,
    SourceFile,
    is_pattern,
    is_wanted_directory,
    split_pattern,
)

STANDARD_LIBRARY = "python:stdlib"
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def standard_library() -> Iterator[SourceFile]:
    """The .py files of the running Python's standard library, without tests and what was installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return (file for file in _walk(root, _NOT_LIBRARY) if file.relative.endswith(".py"))


def directory(path: Path) -> Iterator[SourceFile]:
    """Every file below a directory, without hidden ones and what is not the author's (see `is_wanted_directory`)."""
    return _walk(path)


def others(path: Path) -> Iterator[SourceFile]:
    """The one file of a path, or the files that a glob matches; hidden ones only where the pattern names them."""
    if path.exists():
        yield SourceFile(Root(str(path.parent)), path.name)
    elif is_pattern(str(path)):
        yield from _glob(path)


def _walk(top: Path, without: frozenset[str] = frozenset()) -> Iterator[SourceFile]:
    root = Root(str(top), top.resolve().name)
    checkouts = {"": ""}
    for folder, below, names in os.walk(top, onerror=_raise):
        here = Path(folder)
        relative = "" if here == top else here.relative_to(top).as_posix()
        checkout = checkouts.pop(relative)
        if relative and ".git" in (*below, *names):  # a file in a worktree and a submodule
            checkout = relative
        # Pruned in place, which is how os.walk is told not to go there.
        below[:] = [
            name
            for name in below
            if is_wanted_directory(name) and name not in without and not _is_environment(here / name)
        ]
        prefix = relative and f"{relative}/"
        checkouts |= {prefix + name: checkout for name in below}
        for name in names:
            if not name.startswith(HIDDEN) and (here / name).is_file():
                yield SourceFile(root, prefix + name, checkout)


def _raise(error: OSError) -> None:
    """Without this, what lies below a directory that may not be listed would be missing in silence."""
    raise error


def _is_environment(folder: Path) -> bool:
    """Whether a directory is a virtual environment of Python."""
    try:
        return (folder / "pyvenv.cfg").exists()
    except PermissionError:
        return False  # said in words when it is to be listed


def _glob(pattern: Path) -> Iterator[SourceFile]:
    fixed, rest = split_pattern(pattern.as_posix())
    rest += "/*" if rest.endswith("**") else ""  # pathlib's own `**` matches directories alone
    top = Path(fixed)
    root = Root(fixed, top.resolve().name)
    hidden_wanted = any(part.startswith(HIDDEN) for part in rest.split("/"))
    for path in set(top.glob(rest)):
        name = path.relative_to(top)
        if path.is_file() and (hidden_wanted or not any(part.startswith(HIDDEN) for part in name.parts)):
            yield SourceFile(root, name.as_posix(), _checkout_of(top, name))


def _checkout_of(top: Path, name: Path) -> str:
    """The nearest directory above a file, and below the top, that is a checkout of git."""
    above = list(name.parents)[:-1]
    return next((folder.as_posix() for folder in above if (top / folder / ".git").exists()), "")
