"""Where a file of a source lies: on a local disk or at an address, and in which repository."""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SourceFormat = Literal["code", "text", "chat"]
_CODE_EXTENSIONS = """
py pyi js jsx mjs ts tsx java c h cc cpp cxx hh hpp cu go rs rb php cs swift kt scala sh bash sql lua pl r jl
hs ml ex exs erl clj dart zig m mm html css scss vue svelte yaml yml toml proto tf cmake md rst"""
CODE_SUFFIXES = frozenset("." + name for name in _CODE_EXTENSIONS.split())
COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
_PROSE_SUFFIXES = frozenset({".md", ".rst"})
_TEXT_SUFFIXES = frozenset({".txt", ".md"})
HIDDEN_PREFIX = "."
"""What a hidden name begins with."""
_WILDCARD_PATTERN = re.compile(r"[*?\[]")
_EXCLUDED_DIRECTORIES = frozenset({"node_modules", "__pycache__", "site-packages"})


@dataclass(frozen=True)
class SourceRoot:
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

    root: SourceRoot
    relative: str
    checkout: str = ""
    stamp: str = ""

    @property
    def name(self) -> str:
        """`relative` as text, even where the file system holds bytes that are none."""
        return _escape_undecodable(self.relative)

    @property
    def repository(self) -> str:
        """Name of the repository: the directory's name, or the path of a checkout below it."""
        if self.checkout == self.root.repository:  # a checkout `a` in a directory `a` is another repository than it
            return _escape_undecodable(f"{self.checkout}/{self.checkout}" if self.checkout else "")
        return _escape_undecodable(self.checkout or self.root.repository)

    @property
    def path(self) -> str:
        """Its path within the repository."""
        return _escape_undecodable(self.relative[len(self.checkout) + 1 :] if self.checkout else self.relative)

    @property
    def filesystem_path(self) -> str:
        """Its path within the file system."""
        return f"{self.root.path.rstrip('/')}/{self.relative}" if self.root.path else self.relative

    @property
    def display_path(self) -> str:
        """Where a person finds it: a path, or an address."""
        if self.root.filesystem is None:
            return _escape_undecodable(str(Path(self.root.path, self.relative)))
        return self.root.scheme + self.filesystem_path

    @property
    def version_stamp(self) -> str:
        """Size and modification time, or what the store has instead of it. Raises OSError for a local file gone."""
        if self.root.filesystem is not None:
            return self.stamp
        status = Path(self.filesystem_path).stat()
        return f"{status.st_size}\0{status.st_mtime_ns}"


def _escape_undecodable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


class FileFormat(enum.Enum):
    """How a file holds its documents."""

    WHOLE = "a document"
    LINES = "JSON lines"
    JSON = "JSON"
    PARQUET = "Parquet"
    ARROW = "Arrow"


RECORD_FILE_FORMATS = {
    ".jsonl": FileFormat.LINES,
    ".ndjson": FileFormat.LINES,
    ".parquet": FileFormat.PARQUET,
    ".arrow": FileFormat.ARROW,
    ".feather": FileFormat.ARROW,
}


def get_content_suffix(name: str) -> str:
    """The suffix in lower case that says what is in a file, below that of a compression: `.jsonl` of `a.jsonl.gz`."""
    stem, last = posixpath.splitext(_strip_query(name))
    return posixpath.splitext(stem)[1] if last in COMPRESSION_SUFFIXES else last


def _strip_query(name: str) -> str:
    """A name in lower case as far as it names a file: `a.jsonl` of the address `…/a.jsonl?download=true`."""
    return name.lower().partition("?")[0]


def get_compression_suffix(name: str) -> str | None:
    """The suffix of the compression, such as `.gz`; None for a plain file."""
    last = posixpath.splitext(_strip_query(name))[1]
    return last if last in COMPRESSION_SUFFIXES else None


def detect_file_format(name: str, form: SourceFormat) -> FileFormat:
    """How a file is read. A .json file is a document of its own among code, and holds records otherwise."""
    ending = get_content_suffix(name)
    if ending == ".json" and form != "code":
        return FileFormat.JSON
    return RECORD_FILE_FORMATS.get(ending, FileFormat.WHOLE)


def select_readable_files(found: Iterable[SourceFile], form: SourceFormat) -> list[SourceFile]:
    """The files of a directory that a format reads.

    chat: files of records, .json among them. text: files of records, .txt and .md. code: source files; only where
    there is none but .md and .rst (a data set with its README), files of records.
    """
    files = list(found)
    records = [file for file in files if get_content_suffix(file.relative) in RECORD_FILE_FORMATS]
    if form == "chat":
        return [file for file in files if detect_file_format(file.relative, form) is not FileFormat.WHOLE]
    if form == "text":
        return records + [file for file in files if get_content_suffix(file.relative) in _TEXT_SUFFIXES]
    code = [file for file in files if posixpath.splitext(file.relative.lower())[1] in CODE_SUFFIXES]
    return records if records and all(get_content_suffix(file.relative) in _PROSE_SUFFIXES for file in code) else code


def format_searched_suffixes(form: SourceFormat) -> str:
    """What a directory is searched for, in words."""
    records = "/".join(sorted(RECORD_FILE_FORMATS))
    return {
        "code": f"source files, or {records} where there are none",
        "text": f"{records}/.md/.txt",
        "chat": f"{records}/.json",
    }[form]


def has_wildcards(path: str) -> bool:
    """Whether a path has wildcards."""
    return _WILDCARD_PATTERN.search(path) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """The directory in front of the first wildcard, and the rest. `a/b/*.py` is `a/b` and `*.py`."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_wildcards(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[fixed:])


def is_wanted_directory(name: str) -> bool:
    """Whether a directory is searched: not a hidden one, installed packages or what Python compiled."""
    return not name.startswith(HIDDEN_PREFIX) and name not in _EXCLUDED_DIRECTORIES
