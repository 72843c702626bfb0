"""Documents of a repository's history: commits in special tokens, unified diffs, or next edits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.git.edits import has_edit_markers, iter_edit_segments
from llm_training_toolkit.data.git.patch import FileChange, UnusableChange
from llm_training_toolkit.data.git.repository import Commit, HistoryReader
from llm_training_toolkit.data.layouts.commits import build_commit_segments
from llm_training_toolkit.data.sources.document import DocumentStats
from llm_training_toolkit.data.sources.files import SourceFile, SourceRoot
from llm_training_toolkit.data.types import Document, MarkedText
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan.checks.git_check import find_repository_problem, read_head_commit, resolve_repository

# Lines of a message that name people: Signed-off-by, Co-authored-by, Reviewed-by, Cc. Not a first line such as
# `Stand-by: …`, unless it holds an address: then the message has no subject.
_PEOPLE = re.compile(r"^(?:[A-Za-z]+(?:-[A-Za-z]+)*-by|cc): .*(?:\n|$)", re.IGNORECASE | re.MULTILINE)
_ADDRESS = re.compile(r"<[^<>\s@]+@[^<>\s]+>")
_PLACE = re.compile(r"@([0-9a-f]{40,64})(?::|$)")


class _Part(NamedTuple):
    """Document of a commit before it is named: what follows the commit's id in its name, path, texts."""

    label: str
    path: str
    segments: tuple[MarkedText, ...]


def find_repository_file(source: SourceConfig) -> SourceFile:
    """Return the repository as the one file of its source; its stamp is the current commit.

    Raises DataError if its history cannot be read.
    """
    problem = find_repository_problem("data.sources", source)
    if problem is not None:
        raise DataError(str(problem))
    path = resolve_repository(source)
    top = path.resolve()
    name = top.name.removesuffix(".git") or "repository"
    return SourceFile(SourceRoot(str(top.parent), name), name, stamp=read_head_commit(path))


def read_history(source: SourceConfig, index: int, tally: DocumentStats, begin: str = "") -> Iterator[Document]:
    """Yield the documents of a history, oldest first, from the commit of the document named `begin` on.

    Counts in `tally` the merges left out, and the files that are binary, too large or not UTF-8.
    """
    file = find_repository_file(source)
    build = _BUILDERS[source.layout]
    place = _PLACE.search(begin)
    whole_files = source.layout in _WHOLE_FILES
    with HistoryReader(resolve_repository(source), source, tally.dropped, whole_files=whole_files) as reader:
        for commit in reader.read_commits(place[1] if place else ""):
            for label, path, segments in build(commit, source, tally):
                text = "\n".join(each.text for each in segments if each.text)
                name = f"{file.repository}@{commit.id}{label}"
                yield Document(index, name, text, file.repository, path, segments=segments)


def remove_people(message: str) -> str:
    """Return a commit's message without e-mail addresses and lines that name people."""
    first, end, rest = message.lstrip().partition("\n")
    if _ADDRESS.search(first):
        first = _PEOPLE.sub("", first)
    return _ADDRESS.sub("", first + end + _PEOPLE.sub("", rest)).strip()


def _build_commits(commit: Commit, source: SourceConfig, tally: DocumentStats) -> Iterator[_Part]:
    """Yield each changed file in StarCoder's commit tokens, with the first line of the message."""
    subject = remove_people(commit.message).partition("\n")[0]
    for change in _iter_texts(commit, tally):
        if change.hunks:  # of a renamed file, or one with another mode, nothing is to be written
            (whole,) = change.hunks
            segments = build_commit_segments(whole.join_side("-"), subject, whole.join_side("+"), source.context)
            yield _Part(f":{change.path}", change.path, segments)


def _build_diffs(commit: Commit, source: SourceConfig, tally: DocumentStats) -> Iterator[_Part]:
    """Yield the commit as its message, an empty line and a unified diff."""
    diffs: list[str] = []
    size = 0
    for change in _iter_texts(commit, tally):
        diffs.append(change.format_diff())
        size += len(diffs[-1].encode())
        if size > source.max_document_bytes:
            tally.dropped["too_large"] += 1
            return
    if diffs:
        yield _Part("", "", (MarkedText((), f"{remove_people(commit.message)}\n\n{''.join(diffs)}"),))


def _build_edits(commit: Commit, source: SourceConfig, tally: DocumentStats) -> Iterator[_Part]:  # noqa: ARG001
    """Yield each edited region before and after; a file that holds the markers of a region is left out."""
    for change in _iter_texts(commit, tally):
        if has_edit_markers(change):
            tally.dropped["edit_markers"] += 1
            continue
        for number, segments in enumerate(iter_edit_segments(change), start=1):
            yield _Part(f":{change.path}:{number}", change.path, segments)


def _iter_texts(commit: Commit, tally: DocumentStats) -> Iterator[FileChange]:
    """Yield the files that are text, and count the others."""
    for change in commit.changes:
        if isinstance(change, UnusableChange):
            tally.dropped[change.reason] += 1
        else:
            yield change


_Builder = Callable[[Commit, SourceConfig, DocumentStats], Iterator[_Part]]
_BUILDERS: Mapping[str, _Builder] = {
    "commits": _build_commits,
    "diffs": _build_diffs,
    "edits": _build_edits,
}
_WHOLE_FILES = frozenset({"commits", "edits"})
