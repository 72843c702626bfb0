"""Where a file of a source lies: on a local disk or at an address, and in which repository."""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Format = Literal["code", "text", "chat"]
_CODE = """py pyi js jsx mjs ts tsx java c h cc cpp cxx hh hpp cu go rs rb php cs swift kt scala sh bash sql lua pl r jl
hs ml ex exs erl clj dart zig m mm html css scss vue svelte yaml yml toml proto tf cmake md rst"""
CODE_SUFFIXES = frozenset("." + name for name in _CODE.split())
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
_PROSE = frozenset({".md", ".rst"})
_TEXT = frozenset({".txt", ".md"})
HIDDEN = "."
"""What a hidden name begins with."""
_MAGIC = re.compile(r"[*?\[]")
_NOT_THE_AUTHORS = frozenset({"node_modules", "__pycache__", "site-packages"})


@dataclass(frozen=True)
class Root:
    """What the files of a source have in common.

    path: of the directory they are below, within its file system. filesystem: pyarrow's, None for a local disk.
    scheme: what an address begins with, such as `s3://`. repository: the directory's name; empty for a lone file,
    which says of no repository.
    """

    path: str
    repository: str = ""
    filesystem: Any = None
    scheme: str = ""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. It holds little, because a source may have millions.

    relative: its path below the root, with slashes. checkout: the directory below the root whose repository it belongs
    to, empty for the root itself. stamp: size and mark of the version of a remote file.
    """

    root: Root
    relative: str
    checkout: str = ""
    stamp: str = ""

    @property
    def name(self) -> str:
        """`relative` as text, even where the file system holds bytes that are none."""
        return _printable(self.relative)

    @property
    def repository(self) -> str:
        """Name of the repository: the directory's name, or the path of a checkout below it."""
        if self.checkout == self.root.repository:  # a checkout `a` in a directory `a` is another repository than it
            return _printable(f"{self.checkout}/{self.checkout}" if self.checkout else "")
        return _printable(self.checkout or self.root.repository)

    @property
    def path(self) -> str:
        """Its path within the repository."""
        return _printable(self.relative[len(self.checkout) + 1 :] if self.checkout else self.relative)

    @property
    def location(self) -> str:
        """Its path within the file system."""
        return f"{self.root.path.rstrip('/')}/{self.relative}" if self.root.path else self.relative

    @property
    def address(self) -> str:
        """Where a person finds it: a path, or an address."""
        if self.root.filesystem is None:
            return _printable(str(Path(self.root.path, self.relative)))
        return self.root.scheme + self.location

    @property
    def version(self) -> str:
        """Size and modification time, or what the store has instead of it. Raises OSError for a local file gone."""
        if self.root.filesystem is not None:
            return self.stamp
        status = Path(self.location).stat()
        return f"{status.st_size}\0{status.st_mtime_ns}"


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


class Kind(enum.Enum):
    """How a file holds its documents."""

    WHOLE = "a document"
    LINES = "JSON lines"
    JSON = "JSON"
    PARQUET = "Parquet"
    ARROW = "Arrow"


RECORDS = {
    ".jsonl": Kind.LINES,
    ".ndjson": Kind.LINES,
    ".parquet": Kind.PARQUET,
    ".arrow": Kind.ARROW,
    ".feather": Kind.ARROW,
}


def suffix(name: str) -> str:
    """The suffix in lower case that says what is in a file, below that of a compression: `.jsonl` of `a.jsonl.gz`."""
    stem, last = posixpath.splitext(_without_query(name))
    return posixpath.splitext(stem)[1] if last in COMPRESSED else last


def _without_query(name: str) -> str:
    """A name in lower case as far as it names a file: `a.jsonl` of the address `…/a.jsonl?download=true`."""
    return name.lower().partition("?")[0]


def compression(name: str) -> str | None:
    """The suffix of the compression, such as `.gz`; None for a plain file."""
    last = posixpath.splitext(_without_query(name))[1]
    return last if last in COMPRESSED else None


def kind_of(name: str, form: Format) -> Kind:
    """How a file is read. A .json file is a document of its own among code, and holds records otherwise."""
    ending = suffix(name)
    if ending == ".json" and form != "code":
        return Kind.JSON
    return RECORDS.get(ending, Kind.WHOLE)


def of_directory(found: Iterable[SourceFile], form: Format) -> list[SourceFile]:
    """The files of a directory that a format reads.

    chat: files of records, .json among them. text: files of records, .txt and .md. code: source files; only where
    there is none but .md and .rst (a data set with its README), files of records.
    """
    files = list(found)
    records = [file for file in files if suffix(file.relative) in RECORDS]
    if form == "chat":
        return [file for file in files if kind_of(file.relative, form) is not Kind.WHOLE]
    if form == "text":
        return records + [file for file in files if suffix(file.relative) in _TEXT]
    code = [file for file in files if posixpath.splitext(file.relative.lower())[1] in CODE_SUFFIXES]
    return records if records and all(suffix(file.relative) in _PROSE for file in code) else code


def searched(form: Format) -> str:
    """What a directory is searched for, in words."""
    records = "/".join(sorted(RECORDS))
    return {
        "code": f"source files, or {records} where there are none",
        "text": f"{records}/.md/.txt",
        "chat": f"{records}/.json",
    }[form]


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards."""
    return _MAGIC.search(path) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """The directory in front of the first wildcard, and the rest. `a/b/*.py` is `a/b` and `*.py`."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if is_pattern(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[fixed:])


def is_wanted_directory(name: str) -> bool:
    """Whether a directory is searched: not a hidden one, installed packages or what Python compiled."""
    return not name.startswith(HIDDEN) and name not in _NOT_THE_AUTHORS
