"""What a file is by its name: a document of its own, or records; plain or compressed."""

from __future__ import annotations

import enum
import posixpath
from collections.abc import Iterable
from typing import Literal

from llm_training_toolkit.data.sources.place import SourceFile

Format = Literal["code", "text", "chat"]

_CODE = """py pyi js jsx mjs ts tsx java c h cc cpp cxx hh hpp cu go rs rb php cs swift kt scala sh bash sql lua pl r jl
hs ml ex exs erl clj dart zig m mm html css scss vue svelte yaml yml toml proto tf cmake md rst"""
CODE_SUFFIXES = frozenset("." + name for name in _CODE.split())
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
_PROSE = frozenset({".md", ".rst"})
_TEXT = frozenset({".txt", ".md"})


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
