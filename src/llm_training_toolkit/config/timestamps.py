"""Dates and times of the configuration as seconds since 1970. Pure."""

from __future__ import annotations

from datetime import UTC, datetime


def parse_timestamp(text: str) -> int:
    """Return the seconds since 1970 of an ISO 8601 date or time, in UTC unless it names another zone.

    Raises ValueError for any other text.
    """
    found = datetime.fromisoformat(text)
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def check_timestamp(text: str) -> str:
    """Return the text. Raises ValueError, saying what is expected, if it is no date or time."""
    try:
        parse_timestamp(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no date: write 2026-01-31 or 2026-01-31T12:00:00+00:00") from error
    return text
