"""Values of a record's fields, checked: text, names, numbers of stars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm_training_toolkit.data.sources.document import UnreadableDocument

_MAX_STARS = 2**53  # above it, a table's floating-point number is not an exact count


def read_text_field(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    name = find_field(names, values)
    if name is None:
        raise UnreadableDocument(
            where, f"has no field {format_alternatives(names)} (its fields are {sorted(values)[:8]})", "no_text"
        )
    text = values[name]
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise UnreadableDocument(where, f"is not UTF-8 (byte {error.start} of {name!r})", "invalid_utf8") from error
    if not isinstance(text, str):
        raise UnreadableDocument(where, f"the field {name!r} is {type(text).__name__}, not a string", "no_text")
    return check_encodable(text, where)


def check_encodable(text: str, where: str) -> str:
    """Return the text. Raises UnreadableDocument if it has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone "\ud800" is valid JSON but cannot be encoded
        raise UnreadableDocument(
            where, f"is not text ({error.reason} at character {error.start})", "invalid_utf8"
        ) from error
    return text


def read_label_field(values: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    """Return a path or a name, empty if absent."""
    name = find_field(names, values)
    value = "" if name is None or values[name] is None else values[name]
    if not isinstance(value, str):
        raise UnreadableDocument(where, f"the field {name!r} is {type(value).__name__}, not a string", "wrong_type")
    return check_encodable(value, where)


def read_star_count(values: Mapping[str, Any], names: Sequence[str], where: str) -> int | None:
    """Return the number of stars. Tables with missing values hold 3.0 and NaN."""
    name = find_field(names, values)
    value = None if name is None else values[name]
    if value is None or value != value:  # noqa: PLR0124 - NaN is the one value that differs from itself
        return None
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MAX_STARS
    if not is_count or value != int(value):
        raise UnreadableDocument(where, f"the field {name!r} is {value!r}, not a number of stars", "wrong_type")
    return int(value)


def find_field(names: Sequence[str], among: Sequence[str] | Mapping[str, Any]) -> str | None:
    """Return the first name present, or None. In a record, a null field is chosen last."""
    there = [name for name in names if name in among]
    if isinstance(among, Mapping):
        there.sort(key=lambda name: among[name] is None)
    return there[0] if there else None


def format_alternatives(names: Sequence[str]) -> str:
    """Format names of which one is needed."""
    return " or ".join(map(repr, names))
