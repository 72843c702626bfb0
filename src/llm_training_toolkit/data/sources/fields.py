"""From a record to a document: which fields hold the text and, for code, what is known of the file.

| format | text is in the first of | beside it |
|---|---|---|
| text | `text`, `content` | |
| code | `content`, `text`, `code` | path, repository and stars, each under any name of The Stack's versions |
| chat | whatever `conversation_of` recognises | |

Other fields, such as the language, are left alone. A field that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_training_toolkit.data.chat.parse import Conversation, UnusableRecord, conversation_of
from llm_training_toolkit.data.sources.document import Unreadable
from llm_training_toolkit.data.sources.files import Format
from llm_training_toolkit.data.sources.records import Columns, Record
from llm_training_toolkit.data.types import Document

_TEXT: Mapping[Format, Sequence[str]] = {"text": ("text", "content"), "code": ("content", "text", "code")}
_PATH = ("path", "max_stars_repo_path", "file_path")
_REPOSITORY = ("repository", "repo_name", "repository_name", "max_stars_repo_name")
_STARS = ("stars", "max_stars_count", "star_events_count")
_MOST_STARS = 2**53
"""Beyond it a table's floating-point number is no count any more."""
_KNOWN = (_PATH, _REPOSITORY, _STARS)


def columns_for(form: Format, address: str) -> Columns:
    """Which columns of a table hold what a format needs: of a conversation all, since it has many shapes."""

    def columns(names: Sequence[str]) -> list[str]:
        if form == "chat":
            return list(names)
        text = _first(_TEXT[form], names)
        if text is None:
            raise Unreadable(address, f"has no column {_or(_TEXT[form])} (its columns are {sorted(names)})", "no_text")
        known = [name for among in _KNOWN if (name := _first(among, names))] if form == "code" else []
        return [text, *known]

    return columns


def document_of(record: Record, form: Format, source: int, name: str) -> Document:
    """The document in a record. Raises Unreadable, saying which field is wrong."""
    if form == "chat":
        conversation = _conversation(record)
        text = _checked(conversation.to_text(), record.where)
        return Document(source, name, text, said=conversation.without_switches().to_text())
    values = record.value
    if not isinstance(values, dict):
        raise Unreadable(record.where, f"has no field {_or(_TEXT[form])} (it is no object)", "no_text")
    text = _text(values, _TEXT[form], record.where)
    if form == "text":
        return Document(source, name, text)
    repository, path = (_label(values, names, record.where) for names in (_REPOSITORY, _PATH))
    return Document(source, name, text, repository, path, _stars(values, record.where))


def _conversation(record: Record) -> Conversation:
    try:
        return conversation_of(record.value)
    except UnusableRecord as error:
        raise Unreadable(record.where, error.why, error.reason) from error


def _text(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = _first(names, values)
    if name is None:
        raise Unreadable(where, f"has no field {_or(names)} (its fields are {sorted(values)[:8]})", "no_text")
    text = values[name]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise Unreadable(where, f"is not UTF-8 (byte {error.start} of {name!r})", "invalid_utf8") from error
    if not isinstance(text, str):
        raise Unreadable(where, f"the field {name!r} is {type(text).__name__}, not a string", "no_text")
    return _checked(text, where)


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" alone is valid JSON and yet no text
        raise Unreadable(where, f"is not text ({error.reason} at character {error.start})", "invalid_utf8") from error
    return text


def _label(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """A path or a name; empty where there is none."""
    name = _first(names, values)
    value = "" if name is None or values[name] is None else values[name]
    if not isinstance(value, str):
        raise Unreadable(where, f"the field {name!r} is {type(value).__name__}, not a string", "wrong_type")
    return _checked(value, where)


def _stars(values: Mapping[str, Any], where: str) -> int | None:
    """A number of stars, which tables with missing ones hold as 3.0 and NaN."""
    name = _first(_STARS, values)
    value = None if name is None else values[name]
    if value is None or value != value:  # noqa: PLR0124 - NaN is the one value that differs from itself
        return None
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST_STARS
    if not is_count or value != int(value):
        raise Unreadable(where, f"the field {name!r} is {value!r}, not a number of stars", "wrong_type")
    return int(value)


def _first(names: Sequence[str], among: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The first of the names that is there; in a record one that is null only where no other is."""
    there = [name for name in names if name in among]
    if isinstance(among, Mapping):
        there.sort(key=lambda name: among[name] is None)
    return there[0] if there else None


def _or(names: Sequence[str]) -> str:
    return " or ".join(map(repr, names))
