"""Conversion of records to documents.

Text is in the first field present of `text`, `content` (format text) or `content`, `text`, `code` (format code).
Code records may also have path, repository and stars, each under any name used by The Stack's versions.
Chat records may have any shape that `parse_conversation` recognizes.
Other fields, such as the language, are ignored. A null field counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_training_toolkit.data.chat.parse import Conversation, InvalidRecord, parse_conversation
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import SourceFormat
from llm_training_toolkit.data.sources.records import ColumnSelector, SourceRecord
from llm_training_toolkit.data.types import Document

_TEXT: Mapping[SourceFormat, Sequence[str]] = {"text": ("text", "content"), "code": ("content", "text", "code")}
_PATH = ("path", "max_stars_repo_path", "file_path")
_REPOSITORY = ("repository", "repo_name", "repository_name", "max_stars_repo_name")
_STARS = ("stars", "max_stars_count", "star_events_count")
_MAX_STARS = 2**53  # above it, a table's floating-point number is not an exact count
_METADATA_FIELDS = (_PATH, _REPOSITORY, _STARS)


def build_column_selector(form: SourceFormat, address: str) -> ColumnSelector:
    """Return a selector of the columns that a format needs: all for chat, because conversations have many shapes."""

    def select_columns(names: Sequence[str]) -> list[str]:
        if form == "chat":
            return list(names)
        text = _find_field(_TEXT[form], names)
        if text is None:
            raise UnreadableDocument(
                address,
                f"has no column {_format_alternatives(_TEXT[form])} (its columns are {sorted(names)})",
                "no_text",
            )
        known = [name for among in _METADATA_FIELDS if (name := _find_field(among, names))] if form == "code" else []
        return [text, *known]

    return select_columns


def build_document(record: SourceRecord, form: SourceFormat, source: int, name: str) -> Document:
    """Return the document in a record. Raises UnreadableDocument naming the invalid field."""
    if form == "chat":
        conversation = _parse_conversation(record)
        text = _check_encodable(conversation.to_text(), record.where)
        return Document(source, name, text, dedup_text=conversation.without_loss_overrides().to_text())
    values = record.value
    if not isinstance(values, dict):
        raise UnreadableDocument(
            record.where, f"has no field {_format_alternatives(_TEXT[form])} (it is no object)", "no_text"
        )
    text = _read_text_field(values, _TEXT[form], record.where)
    if form == "text":
        return Document(source, name, text)
    repository, path = (_read_label_field(values, names, record.where) for names in (_REPOSITORY, _PATH))
    return Document(source, name, text, repository, path, _read_star_count(values, record.where))


def _parse_conversation(record: SourceRecord) -> Conversation:
    try:
        return parse_conversation(record.value)
    except InvalidRecord as error:
        raise UnreadableDocument(record.where, error.why, error.reason) from error


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


def _read_star_count(values: Mapping[str, Any], where: str) -> int | None:
    """Return the number of stars. Tables with missing values hold 3.0 and NaN."""
    name = _find_field(_STARS, values)
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
