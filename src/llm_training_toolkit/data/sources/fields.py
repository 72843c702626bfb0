"""Conversion of records to documents.

Text is in the first field present of `text`, `content` (format text) or `content`, `text`, `code` (format code).
Code records may also have path, repository and stars, each under any name used by The Stack's versions.
Chat records may have any shape that `parse_conversation` recognizes.
`SourceConfig.fields` names columns instead. Other fields are ignored. A null field counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.config.schema import FilterValue, SourceConfig
from llm_training_toolkit.data.chat.parse import (
    Conversation,
    ConversationFields,
    InvalidRecord,
    format_missing_column,
    parse_conversation,
)
from llm_training_toolkit.data.chat.prompt_templates import has_context
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import SourceFormat
from llm_training_toolkit.data.sources.records import SourceRecord
from llm_training_toolkit.data.types import Document

_TEXT: Mapping[SourceFormat, Sequence[str]] = {"text": ("text", "content"), "code": ("content", "text", "code")}
_PATH = ("path", "max_stars_repo_path", "file_path")
_REPOSITORY = ("repository", "repo_name", "repository_name", "max_stars_repo_name")
_STARS = ("stars", "max_stars_count", "star_events_count")
_LANGUAGE = ("language", "lang", "programming_language")
_MAX_STARS = 2**53  # above it, a table's floating-point number is not an exact count


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
            ConversationFields(**chat, keeps_context=has_context(source.prompt_template)),
            tuple(given.values()),
            wanted,
            source.max_document_bytes,
        )

    def select_columns(self, names: Sequence[str], address: str) -> list[str]:
        """Return the columns that a table is read for: all for chat, because conversations have many shapes.

        Raises UnreadableDocument if one is missing.
        """
        for missing in (name for name in self.named if name not in names):
            raise UnreadableDocument(address, format_missing_column(missing, names), "no_field")
        found = [_find_field(each, names) for each in self.filter]
        if None in found:
            column = list(self.filter)[found.index(None)][0]
            raise UnreadableDocument(address, f"filter: {format_missing_column(column, names)}", "no_field")
        if self.form == "chat":
            return list(names)
        text = _find_field(self.text, names)
        if text is None:
            raise UnreadableDocument(
                address,
                f"has no column {_format_alternatives(self.text)} (its columns are {sorted(names)})",
                "no_text",
            )
        metadata = (self.path, self.repository, self.stars) if self.form == "code" else ()
        known = [name for among in metadata if (name := _find_field(among, names))]
        return list(dict.fromkeys([text, *known, *(name for name in found if name is not None)]))

    def is_wanted(self, record: SourceRecord) -> bool:
        """Return whether a record passes the filter. A record without a column of the filter does not."""
        if not self.filter:
            return True
        values = record.value if isinstance(record.value, dict) else {}
        return all(
            (name := _find_field(names, values)) is not None and _is_among(values[name], wanted)
            for names, wanted in self.filter.items()
        )

    def get_filter_values(self, record: SourceRecord) -> dict[str, Any]:
        """Return the values that the filter looks at, by column; a missing column is absent."""
        values = record.value if isinstance(record.value, dict) else {}
        found = (_find_field(names, values) for names in self.filter)
        return {name: values[name] for name in found if name is not None}

    def build_document(self, record: SourceRecord, source: int, name: str) -> Document:
        """Return the document in a record. Raises UnreadableDocument naming the invalid field."""
        if self.form == "chat":
            conversation = self._parse_conversation(record)
            text = _check_encodable(conversation.to_text(), record.where)
            return Document(source, name, text, dedup_text=conversation.without_loss_overrides().to_text())
        values = record.value
        if not isinstance(values, dict):
            raise UnreadableDocument(
                record.where, f"has no field {_format_alternatives(self.text)} (it is no object)", "no_text"
            )
        for missing in (column for column in self.named if column not in values):
            raise UnreadableDocument(record.where, format_missing_column(missing, values), "no_field")
        text = _read_text_field(values, self.text, record.where)
        if self.form == "text":
            return Document(source, name, text)
        repository, path = (_read_label_field(values, each, record.where) for each in (self.repository, self.path))
        return Document(source, name, text, repository, path, _read_star_count(values, self.stars, record.where))

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


def _read_text_field(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = _find_field(names, values)
    if name is None:
        raise UnreadableDocument(
            where, f"has no field {_format_alternatives(names)} (its fields are {sorted(values)[:8]})", "no_text"
        )
    text = values[name]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise UnreadableDocument(where, f"is not UTF-8 (byte {error.start} of {name!r})", "invalid_utf8") from error
    if not isinstance(text, str):
        raise UnreadableDocument(where, f"the field {name!r} is {type(text).__name__}, not a string", "no_text")
    return _check_encodable(text, where)


def _check_encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone "\ud800" is valid JSON but cannot be encoded
        raise UnreadableDocument(
            where, f"is not text ({error.reason} at character {error.start})", "invalid_utf8"
        ) from error
    return text


def _read_label_field(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """Return a path or a name, empty if absent."""
    name = _find_field(names, values)
    value = "" if name is None or values[name] is None else values[name]
    if not isinstance(value, str):
        raise UnreadableDocument(where, f"the field {name!r} is {type(value).__name__}, not a string", "wrong_type")
    return _check_encodable(value, where)


def _read_star_count(values: Mapping[str, Any], names: Sequence[str], where: str) -> int | None:
    """Return the number of stars. Tables with missing values hold 3.0 and NaN."""
    name = _find_field(names, values)
    value = None if name is None else values[name]
    if value is None or value != value:  # noqa: PLR0124 - NaN is the one value that differs from itself
        return None
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_STARS
    if not is_count or value != int(value):
        raise UnreadableDocument(where, f"the field {name!r} is {value!r}, not a number of stars", "wrong_type")
    return int(value)


def _find_field(names: Sequence[str], among: Sequence[str] | Mapping[str, Any]) -> str | None:
    """Return the first name present, or None. In a record, a null field is chosen last."""
    there = [name for name in names if name in among]
    if isinstance(among, Mapping):
        there.sort(key=lambda name: among[name] is None)
    return there[0] if there else None


def _format_alternatives(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))
