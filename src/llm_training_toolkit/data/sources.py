"""Turns a source of the configuration into documents, in an order that never changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.errors import DataError

STANDARD_LIBRARY = "python:stdlib"
_CODE = """py pyi js jsx mjs ts tsx java c h cc cpp cxx hh hpp cu go rs rb php cs swift kt scala sh bash sql lua pl r jl
hs ml ex exs erl clj dart zig m mm html css scss vue svelte yaml yml toml proto tf cmake md rst"""
CODE_SUFFIXES = frozenset("." + name for name in _CODE.split())
TEXT_SUFFIXES = frozenset({".txt", ".md", ".jsonl"})
_NEVER_CODE = frozenset({"node_modules", "__pycache__", "site-packages"})
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_MAGIC = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Document:
    """One document: the number of its source, a name that leads back to it, and its text."""

    source: int
    name: str
    text: str


@dataclass
class Tally:
    """What became of the documents of one source: kept, dropped on purpose, skipped because unreadable (by reason)."""

    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: str = ""


class SourceFile(NamedTuple):
    """A file and its name relative to the root of its source."""

    path: Path
    name: str


class _Unreadable(Exception):  # noqa: N818 - never leaves this module
    """A document that cannot be had: where, why in words, and the reason it is counted under."""

    def __init__(self, where: str, why: str, reason: str) -> None:
        super().__init__(f"{where}: {why}")
        self.reason = reason


def content_hash(text: str) -> bytes:
    """32 bytes that stand for a document's content: equal documents, equal hashes."""
    return hashlib.sha256(text.encode()).digest()


def documents(
    source: Source,
    index: int,
    *,
    on_error: Literal["stop", "skip"] = "stop",
    tally: Tally | None = None,
    seen: set[bytes] | None = None,
) -> Iterator[Document]:
    """Yield the documents of a source, sorted by file name, then by line.

    Documents of white space alone and documents whose content is already in `seen` are dropped and counted in `tally`.
    Raises DataError, naming file and line, for a path that matches nothing, and with `on_error="stop"` for the first
    document that cannot be read; with "skip" those are counted.
    """
    tally = Tally() if tally is None else tally
    seen = set() if seen is None else seen
    for name, text in _readable(source, on_error, tally):
        if not text or text.isspace():
            tally.dropped["empty"] += 1
            continue
        digest = content_hash(text)
        if digest in seen:
            tally.dropped["duplicate"] += 1
            continue
        seen.add(digest)
        tally.kept += 1
        yield Document(index, name, text)


def check_skipped(tallies: Iterable[Tally], max_skipped: float) -> None:
    """Raise DataError when a larger share of the documents than `max_skipped` could not be read."""
    tallies = list(tallies)
    reasons: Counter[str] = sum((tally.skipped for tally in tallies), Counter())
    skipped = reasons.total()
    total = skipped + sum(tally.kept + tally.dropped.total() for tally in tallies)
    if skipped and skipped > max_skipped * total:
        first = next(tally.first_skipped for tally in tallies if tally.first_skipped)
        raise DataError(
            f"data.max_skipped: {skipped} of {total} documents could not be read ({_listed(reasons)}), more than the "
            f"share of {max_skipped:g} that may be skipped. The first: {first}. Repair them, or raise data.max_skipped."
        )


def fingerprint(sources: Iterable[Source]) -> str:
    """Hex sha256 over relative name, size and modification time of every file; the contents are not read.

    Raises DataError for a path that matches nothing.
    """
    digest = hashlib.sha256()
    for source in sources:
        digest.update(b"\0source")
        for file in files(source):
            status = file.path.stat()
            digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()


def files(source: Source) -> list[SourceFile]:
    """The files of a source, sorted by name. Raises DataError when there are none.

    A file named by its path or matched by a glob is taken whatever its suffix; a directory is searched for the
    suffixes of the format, without hidden directories, `node_modules` and virtual environments.
    """
    found = sorted(_find(source), key=lambda file: file.name)
    if not found:
        suffixes = "source files" if source.format == "code" else "/".join(sorted(TEXT_SUFFIXES)) + " files"
        raise DataError(
            f"data.sources: {source.path!r} matches no file (looked from {Path.cwd()}; a directory is searched for "
            f"{suffixes}). Correct the path; a relative one counts from the working directory."
        )
    return found


def _find(source: Source) -> Iterator[SourceFile]:
    if source.path == STANDARD_LIBRARY:
        yield from _walk(Path(sysconfig.get_paths()["stdlib"]), frozenset({".py"}), _NOT_LIBRARY)
        return
    if "://" in source.path:
        raise DataError(
            f"data.sources: {source.path!r} is an address, and only files can be read. Mount or copy it, and give "
            "the path of the files."
        )
    path = Path(source.path).expanduser()
    suffixes = CODE_SUFFIXES if source.format == "code" else TEXT_SUFFIXES
    if path.is_dir():
        yield from _walk(path, suffixes, _NEVER_CODE)
    elif path.exists():
        yield SourceFile(path, _printable(Path(path.name)))
    elif _MAGIC.search(str(path)):
        yield from _glob(path)


def _walk(root: Path, suffixes: frozenset[str], without: frozenset[str]) -> Iterator[SourceFile]:
    for folder, below, names in os.walk(root):
        here = Path(folder)
        # Pruned in place, which is how os.walk is told not to go there.
        below[:] = [
            name
            for name in below
            if not name.startswith(".") and name not in without and not (here / name / "pyvenv.cfg").exists()
        ]
        for name in names:
            path = here / name
            if path.suffix.lower() in suffixes and not name.startswith(".") and path.is_file():
                yield SourceFile(path, _printable(path.relative_to(root)))


def _glob(pattern: Path) -> Iterator[SourceFile]:
    """Files below the fixed part of a glob; hidden ones only where the pattern names them."""
    fixed = next(i for i, part in enumerate(pattern.parts) if _MAGIC.search(part))
    root, parts = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
    hidden_wanted = any(part.startswith(".") for part in parts)
    for path in set(root.glob(str(Path(*parts)))):
        name = path.relative_to(root)
        if path.is_file() and (hidden_wanted or not any(part.startswith(".") for part in name.parts)):
            yield SourceFile(path, _printable(name))


def _printable(name: Path) -> str:
    """A name that is text even where the file system holds bytes that are none."""
    return name.as_posix().encode(errors="backslashreplace").decode()


def _readable(source: Source, on_error: str, tally: Tally) -> Iterator[tuple[str, str]]:
    """Name and text of what can be read; what cannot stops here or is counted."""
    for file in files(source):
        for item in _read(file, source.format):
            if not isinstance(item, _Unreadable):
                yield item
                continue
            if on_error == "stop":
                raise DataError(f"{item}. Repair or remove it, or set data.on_error: skip.") from item
            tally.skipped[item.reason] += 1
            tally.first_skipped = tally.first_skipped or str(item)


def _read(file: SourceFile, form: str) -> Iterator[tuple[str, str] | _Unreadable]:
    try:
        if form == "text" and file.path.suffix.lower() == ".jsonl":
            yield from _lines(file)
        else:
            yield file.name, _decoded(file.path.read_bytes(), file.path, 1)
    except OSError as error:
        yield _Unreadable(str(file.path), f"cannot be read ({error.strerror or error})", "unreadable")
    except _Unreadable as error:
        yield error


def _lines(file: SourceFile) -> Iterator[tuple[str, str] | _Unreadable]:
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield f"{file.name}:{number}", _record(line, file.path, number)
            except _Unreadable as error:
                yield error


def _record(line: bytes, path: Path, number: int) -> str:
    """The field `text` of one line of a .jsonl file."""
    where = f"{path}:{number}"
    try:
        record = json.loads(_decoded(line, path, number))
    except (json.JSONDecodeError, RecursionError) as error:
        raise _Unreadable(where, f"is not JSON ({error})", "invalid_json") from error
    if not isinstance(record, dict) or "text" not in record:
        has = f"its fields are {sorted(record)[:8]}" if isinstance(record, dict) else "it is no object"
        raise _Unreadable(where, f"has no field 'text' ({has})", "no_text")
    text = record["text"]
    if not isinstance(text, str):
        raise _Unreadable(where, f"the field 'text' is {type(text).__name__}, not a string", "no_text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" alone is valid JSON and yet no text
        raise _Unreadable(where, f"is not text ({error.reason} at character {error.start})", "invalid_utf8") from error
    return text


def _decoded(raw: bytes, path: Path, first_line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        where = f"{path}:{line}"
        why = f"is not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start})"
        raise _Unreadable(where, why, "invalid_utf8") from error


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
