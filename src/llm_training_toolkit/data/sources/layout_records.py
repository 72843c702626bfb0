"""Conversion of records and files of commits, issues and notebooks to documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.layouts.commits import ContextKind, build_commit_segments
from llm_training_toolkit.data.layouts.issues import parse_issue
from llm_training_toolkit.data.layouts.marked_content import InvalidLayoutRecord, split_marked_content
from llm_training_toolkit.data.layouts.notebooks import parse_notebook
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.field_values import (
    check_encodable,
    find_field,
    format_alternatives,
    read_label_field,
    read_text_field,
)
from llm_training_toolkit.data.types import Document, MarkedText
from llm_training_toolkit.families.document_layouts import COMMIT_MARKERS, ISSUE_MARKERS, NOTEBOOK_MARKERS

LAYOUT_FORMATS = frozenset({"commits", "issues", "notebooks"})
_MARKERS = {"commits": COMMIT_MARKERS, "issues": ISSUE_MARKERS, "notebooks": NOTEBOOK_MARKERS}
# Names in CommitPack, in The Stack and its issues, and in StarCoderData, whose `content` holds the markers.
_USUAL = {
    "before": ("old_contents",),
    "message": ("subject", "message"),
    "after": ("new_contents",),
    "title": ("title",),
    "events": ("events",),
    "content": ("content", "text"),
    "path": ("path", "max_stars_repo_path", "file_path", "new_file", "old_file"),
    "repository": ("repository", "repo_name", "repository_name", "max_stars_repo_name", "repo", "repos"),
}
_COMMIT_FIELDS = ("before", "message", "after")


@dataclass(frozen=True)
class LayoutRecordReader:
    """Reads the records of one source in a layout; `columns` has the names of each field, the first present counts."""

    form: str
    columns: Mapping[str, Sequence[str]]
    as_script: bool
    context: ContextKind

    @classmethod
    def from_config(cls, source: SourceConfig) -> LayoutRecordReader:
        """Build the reader of a configured source."""
        given = source.fields.given if source.fields else {}
        columns = {field: (given[field],) if field in given else usual for field, usual in _USUAL.items()}
        return cls(source.format, columns, source.layout == "script", source.context)

    def select_columns(self, names: Sequence[str], address: str) -> list[str]:
        """Return the columns that a table is read for. Raises UnreadableDocument if one is missing."""
        if self.form == "issues":
            return list(names)
        fields = _COMMIT_FIELDS if self.form == "commits" else ("content",)
        found = {field: find_field(self.columns[field], names) for field in fields}
        if None in found.values() and (content := find_field(self.columns["content"], names)):
            found = {"content": content}  # written with its markers
        for field in (field for field, name in found.items() if name is None):
            wanted = format_alternatives(self.columns[field])
            raise UnreadableDocument(address, f"has no column {wanted} (its columns are {sorted(names)})", "no_text")
        labels = (find_field(self.columns[field], names) for field in ("path", "repository"))
        return [name for name in (*found.values(), *labels) if name is not None]

    def build_document(self, values: Mapping[str, Any], where: str, source: int, name: str) -> Document:
        """Return the document in a record. Raises UnreadableDocument naming the invalid field."""
        path, repositories = (read_label_field(values, self.columns[field], where) for field in ("path", "repository"))
        segments = _wrap_errors(lambda: self._parse_record(values, where), where)
        # CommitPack lists every repository that has the commit, forks included.
        return _build_document(segments, where, source, name, (repositories.partition(",")[0], path))

    def build_notebook(self, content: str, where: str, source: int, name: str, labels: tuple[str, str]) -> Document:
        """Return the document of an .ipynb file. Raises UnreadableDocument if it is no notebook."""
        segments = _wrap_errors(lambda: parse_notebook(content, as_script=self.as_script), where)
        return _build_document(segments, where, source, name, labels)

    def _parse_record(self, values: Mapping[str, Any], where: str) -> tuple[MarkedText, ...]:
        content = self._read_marked_content(values)
        if content:
            return content
        if self.form == "issues":
            return parse_issue(values, self.columns["title"][0], self.columns["events"][0])
        if self.form == "notebooks":
            return parse_notebook(read_text_field(values, self.columns["content"], where), as_script=self.as_script)
        before, message, after = (self._read_commit_field(values, field, where) for field in _COMMIT_FIELDS)
        return build_commit_segments(before, message, after, self.context)

    def _read_marked_content(self, values: Mapping[str, Any]) -> tuple[MarkedText, ...]:
        name = find_field(self.columns["content"], values)
        content = values[name] if name is not None else None
        return split_marked_content(content, _MARKERS[self.form]) if isinstance(content, str) else ()

    def _read_commit_field(self, values: Mapping[str, Any], field: str, where: str) -> str:
        """Return a text of a commit; a file that does not exist on one side may be null."""
        name = find_field(self.columns[field], values)
        if name is not None and values[name] is None and field != "message":
            return ""
        return read_text_field(values, self.columns[field], where)


def _wrap_errors(parse: Callable[[], tuple[MarkedText, ...]], where: str) -> tuple[MarkedText, ...]:
    try:
        return parse()
    except InvalidLayoutRecord as error:
        raise UnreadableDocument(where, error.why, error.reason) from error


def _build_document(
    segments: tuple[MarkedText, ...], where: str, source: int, name: str, labels: tuple[str, str]
) -> Document:
    text = check_encodable("\n".join(each.text for each in segments if each.text), where)
    return Document(source, name, text, *labels, segments=segments)
