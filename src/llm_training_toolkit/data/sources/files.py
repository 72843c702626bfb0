"""Source files: location on a local disk or at an address, repository, and format."""

from __future__ import annotations

import enum
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.source_config import SourceFormat
from llm_training_toolkit.config.uri import redact_uri

_CODE_EXTENSIONS = """
py pyi js jsx mjs ts tsx java c h cc cpp cxx hh hpp cu go rs rb php cs swift kt scala sh bash sql lua pl r jl
hs ml ex exs erl clj dart zig m mm html css scss vue svelte yaml yml toml proto tf cmake md rst"""
CODE_SUFFIXES = frozenset("." + name for name in _CODE_EXTENSIONS.split())
COMPRESSION_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
_PROSE_SUFFIXES = frozenset({".md", ".rst"})
_TEXT_SUFFIXES = frozenset({".txt", ".md"})
_NOTEBOOK_SUFFIX = ".ipynb"
# Formats whose documents are records, also those of .json files.
_RECORD_FORMATS = frozenset({"chat", "commits", "issues"})
HIDDEN_PREFIX = "."
_WILDCARD_PATTERN = re.compile(r"[*?\[]")
_EXCLUDED_DIRECTORIES = frozenset({"node_modules", "__pycache__", "site-packages"})


@dataclass(frozen=True)
class SourceRoot:
    """Common root of the files of a source.

    `path`: root directory in the file system. `filesystem`: pyarrow's, None for the local disk. `scheme`: prefix of an
    address, such as `s3://`. `repository`: directory name, empty for a single file (repository unknown).
    """

    path: str
    repository: str = ""
    filesystem: Any = None
    scheme: str = ""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """File of a source. Kept small, because a source may have millions.

    `relative`: path below the root, with slashes. `checkout`: git checkout below the root that contains the file, empty
    for the root itself. `stamp`: size and version tag of a remote or downloaded file.
    """

    root: SourceRoot
    relative: str
    checkout: str = ""
    stamp: str = ""

    @property
    def name(self) -> str:
        """`relative` without a query, with undecodable bytes escaped."""
        return _escape_undecodable(self._relative_without_query)

    @property
    def _relative_without_query(self) -> str:
        """`relative` without the query of a web address, which may hold a signature."""
        return redact_uri(self.root.scheme + self.relative).removeprefix(self.root.scheme)

    @property
    def repository(self) -> str:
        """Repository name: the root directory's name, or the path of a checkout below it."""
        if self.checkout == self.root.repository:  # a checkout `a` in a root `a` is a repository of its own
            return _escape_undecodable(f"{self.checkout}/{self.checkout}" if self.checkout else "")
        return _escape_undecodable(self.checkout or self.root.repository)

    @property
    def path(self) -> str:
        """Path within the repository."""
        return _escape_undecodable(
            self.relative[len(self.checkout) + 1 :] if self.checkout else self._relative_without_query
        )

    @property
    def filesystem_path(self) -> str:
        """Path within the file system."""
        return f"{self.root.path.rstrip('/')}/{self.relative}" if self.root.path else self.relative

    @property
    def display_path(self) -> str:
        """Path or address for messages."""
        if self.root.filesystem is None:
            return _escape_undecodable(str(Path(self.root.path, self.relative)))
        path = self.filesystem_path  # of fsspec's web server with its scheme
        return redact_uri(path if path.startswith(self.root.scheme) else self.root.scheme + path)

    @property
    def version_stamp(self) -> str:
        """Size and modification time, or the store's version tag. Raises OSError for a missing local file."""
        if self.root.filesystem is not None or self.stamp:
            return self.stamp
        status = Path(self.filesystem_path).stat()
        return f"{status.st_size}\0{status.st_mtime_ns}"


def _escape_undecodable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


class FileFormat(enum.Enum):
    """Format of a source file: a single document, or records."""

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
    """Return the lower-case suffix without a compression suffix: `.jsonl` for `a.jsonl.gz`."""
    stem, last = posixpath.splitext(_strip_query(name))
    return posixpath.splitext(stem)[1] if last in COMPRESSION_SUFFIXES else last


def _strip_query(name: str) -> str:
    """Return the lower-case name without an address's query: `a.jsonl` for `a.jsonl?download=true`."""
    return name.lower().partition("?")[0]


def get_compression_suffix(name: str) -> str | None:
    """Return the compression suffix, such as `.gz`, or None for an uncompressed file."""
    last = posixpath.splitext(_strip_query(name))[1]
    return last if last in COMPRESSION_SUFFIXES else None


def detect_file_format(name: str, form: SourceFormat) -> FileFormat:
    """Return the format of a file. A .json file is a single document for code and holds records otherwise."""
    ending = get_content_suffix(name)
    if ending == ".json" and form != "code":
        return FileFormat.JSON
    return RECORD_FILE_FORMATS.get(ending, FileFormat.WHOLE)


def select_readable_files(found: Iterable[SourceFile], form: SourceFormat) -> list[SourceFile]:
    """Return the files of a directory that a format reads.

    `chat`, `commits`, `issues`: record files, including .json. `notebooks`: .ipynb and record files. `text`: record
    files, .txt and .md. `code`: source files, or record files if the only source files are .md and .rst (a data set
    with its README).
    """
    files = list(found)
    records = [file for file in files if get_content_suffix(file.relative) in RECORD_FILE_FORMATS]
    if form in _RECORD_FORMATS:
        return [file for file in files if detect_file_format(file.relative, form) is not FileFormat.WHOLE]
    if form == "notebooks":
        return records + [file for file in files if get_content_suffix(file.relative) == _NOTEBOOK_SUFFIX]
    if form == "text":
        return records + [file for file in files if get_content_suffix(file.relative) in _TEXT_SUFFIXES]
    code = [file for file in files if posixpath.splitext(file.relative.lower())[1] in CODE_SUFFIXES]
    return records if records and all(get_content_suffix(file.relative) in _PROSE_SUFFIXES for file in code) else code


def format_searched_suffixes(form: SourceFormat) -> str:
    """Format the suffixes searched in a directory, for error messages."""
    records = "/".join(sorted(RECORD_FILE_FORMATS))
    return {
        "code": f"source files, or {records} where there are none",
        "text": f"{records}/.md/.txt",
        "notebooks": f"{_NOTEBOOK_SUFFIX} and {records}",
    }.get(form, f"{records}/.json")


def has_wildcards(path: str) -> bool:
    """Return whether a path has glob wildcards."""
    return _WILDCARD_PATTERN.search(path) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """Split a glob into the directory before the first wildcard and the rest: `a/b/*.py` into `a/b` and `*.py`."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if has_wildcards(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[fixed:])


def is_wanted_directory(name: str) -> bool:
    """Return whether a directory is searched: not hidden, installed packages or compiled Python."""
    return not name.startswith(HIDDEN_PREFIX) and name not in _EXCLUDED_DIRECTORIES
