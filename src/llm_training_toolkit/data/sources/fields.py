"""Conversion of records to documents.

Text is in the first field present of `text`, `content` (format text) or `content`, `text`, `code` (format code).
Code records may also have path, repository and stars, each under any name used by The Stack's versions.
Chat records may have any shape that `parse_conversation` recognizes. Commits, issues and notebooks have the fields of
The Stack and CommitPack, or a `content` that holds the markers of their layout, as in StarCoderData.
`SourceConfig.fields` names columns instead. Other fields are ignored. A null field counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.config.source_config import FilterValue, QualityConfig, SourceConfig, SourceFormat
from llm_training_toolkit.data.chat.parse import (
    Conversation,
    ConversationFields,
    InvalidRecord,
    format_missing_column,
    parse_conversation,
)
from llm_training_toolkit.data.chat.prompt_templates import has_context
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.field_values import (
    check_encodable,
    find_field,
    format_alternatives,
    read_label_field,
    read_star_count,
    read_text_field,
)
from llm_training_toolkit.data.sources.layout_records import LAYOUT_FORMATS, LayoutRecordReader
from llm_training_toolkit.data.sources.quality import LICENSE_COLUMNS, is_licensed
from llm_training_toolkit.data.sources.records import SourceRecord
from llm_training_toolkit.data.types import Document

_TEXT: Mapping[SourceFormat, Sequence[str]] = {"text": ("text", "content"), "code": ("content", "text", "code")}
_PATH = ("path", "max_stars_repo_path", "file_path")
_REPOSITORY = ("repository", "repo_name", "repository_name", "max_stars_repo_name")
_STARS = ("stars", "max_stars_count", "star_events_count")
_LANGUAGE = ("language", "lang", "programming_language")


@dataclass(frozen=True)
class RecordReader:
    """Reads the records of one source: columns of each field (the first present counts), and the filter.

    named: columns that the configuration names, which every record must have. max_bytes: maximum size of a document.
    """

    form: SourceFormat
    text: Sequence[str]
    path: Sequence[str]
    repository: Sequence[str]
    stars: Sequence[str]
    conversation: ConversationFields
    named: tuple[str, ...]
    filter: Mapping[Sequence[str], tuple[FilterValue, ...]]
    max_bytes: int
    layout: LayoutRecordReader | None
    quality: QualityConfig | None

    @classmethod
    def from_config(cls, source: SourceConfig) -> RecordReader:
        """Build the reader of a configured source."""
        given = source.fields.given if source.fields else {}

        def columns(field: str, usual: Sequence[str]) -> Sequence[str]:
            return (given[field],) if field in given else usual

        wanted = {
            columns("language", _LANGUAGE) if column == "language" else (column,): values
            for column, values in (source.filter or {}).items()
        }
        chat = {key: given.get(key) for key in ("prompt", "context", "completion", "system", "messages")}
        return cls(
            source.format,
            columns("content" if source.format == "code" else "text", _TEXT.get(source.format, ())),
            columns("path", _PATH),
            columns("repository", _REPOSITORY),
            columns("stars", _STARS),
            ConversationFields(
                **chat,
                keeps_context=has_context(source.prompt_template),
                masks_failed_steps=source.failed_steps == "mask",
            ),
            tuple(given.values()),
            wanted,
            source.max_document_bytes,
            LayoutRecordReader.from_config(source) if source.format in LAYOUT_FORMATS else None,
            source.quality,
        )

    def select_columns(self, names: Sequence[str], address: str) -> list[str]:
        """Return the columns that a table is read for: all for chat, because conversations have many shapes.

        Raises UnreadableDocument if one is missing.
        """
        for missing in (name for name in self.named if name not in names):
            raise UnreadableDocument(address, format_missing_column(missing, names), "no_field")
        # A filter by `info.exit_status` reads the column `info`, unless a column has that name.
        found = [find_field((*each, each[0].partition(".")[0]), names) for each in self.filter]
        if None in found:
            column = list(self.filter)[found.index(None)][0]
            raise UnreadableDocument(address, f"filter: {format_missing_column(column, names)}", "no_field")
        if self.form == "chat":
            return list(names)
        if self.quality is not None and self.quality.licenses is not None:
            found += [name for name in LICENSE_COLUMNS if name in names]
        if self.layout is not None:
            needed = self.layout.select_columns(names, address)
            return list(dict.fromkeys([*needed, *(name for name in found if name is not None)]))
        text = find_field(self.text, names)
        if text is None:
            raise UnreadableDocument(
                address,
                f"has no column {format_alternatives(self.text)} (its columns are {sorted(names)})",
                "no_text",
            )
        metadata = (self.path, self.repository, self.stars) if self.form == "code" else ()
        known = [name for among in metadata if (name := find_field(among, names))]
        return list(dict.fromkeys([text, *known, *(name for name in found if name is not None)]))

    def is_wanted(self, record: SourceRecord) -> bool:
        """Return whether a record passes the filter. A record that lacks a column of the filter is left out."""
        if not self.filter:
            return True
        values = self._read_filter_columns(record)
        return all(
            (name := find_field(names, values)) is not None and _is_among(values[name], wanted)
            for names, wanted in self.filter.items()
        )

    def is_licensed(self, record: SourceRecord) -> bool:
        """Return whether the licences of a record are among those to keep."""
        return self.quality is None or is_licensed(record.value if isinstance(record.value, dict) else {}, self.quality)

    def get_filter_values(self, record: SourceRecord) -> dict[str, Any]:
        """Return the values that the filter looks at, by column; a missing column is absent."""
        values = self._read_filter_columns(record)
        found = (find_field(names, values) for names in self.filter)
        return {name: values[name] for name in found if name is not None}

    def _read_filter_columns(self, record: SourceRecord) -> Mapping[str, Any]:
        """Return a record with the fields of its columns that the filter names, such as `info.exit_status`."""
        values = record.value if isinstance(record.value, dict) else {}
        nested = {}
        for name in (name for names in self.filter for name in names if "." in name and name not in values):
            value: Any = values
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                nested[name] = value
        return {**values, **nested} if nested else values

    def build_document(self, record: SourceRecord, source: int, name: str) -> Document:
        """Return the document in a record. Raises UnreadableDocument naming the invalid field."""
        if self.form == "chat":
            conversation = self._parse_conversation(record)
            text = check_encodable(conversation.to_text(), record.where)
            return Document(source, name, text, dedup_text=conversation.without_loss_overrides().to_text())
        values = record.value
        if not isinstance(values, dict):
            wanted = f"has no field {format_alternatives(self.text)} (it is no object)"
            raise UnreadableDocument(record.where, wanted if self.text else "is no object", "no_text")
        for missing in (column for column in self.named if column not in values):
            raise UnreadableDocument(record.where, format_missing_column(missing, values), "no_field")
        if self.layout is not None:
            return self.layout.build_document(values, record.where, source, name)
        text = read_text_field(values, self.text, record.where)
        if self.form == "text":
            return Document(source, name, text)
        repository, path = (read_label_field(values, each, record.where) for each in (self.repository, self.path))
        return Document(source, name, text, repository, path, read_star_count(values, self.stars, record.where))

    def _parse_conversation(self, record: SourceRecord) -> Conversation:
        try:
            return parse_conversation(record.value, self.conversation)
        except InvalidRecord as error:
            raise UnreadableDocument(record.where, error.why, error.reason) from error


def _is_among(value: Any, wanted: Sequence[FilterValue]) -> bool:  # noqa: ANN401 - whatever the record holds
    """Return whether a value, or one of a list, is wanted; 1 and true differ."""
    if isinstance(value, list | tuple):
        return any(_is_among(each, wanted) for each in value)
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in wanted)
