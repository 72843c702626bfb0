r"""Layout of issues: title and comments of numbered participants, and the event that closes the issue.

Source: StarCoder (Li et al. 2023), section 5.1, and StarCoder2 (Lozhkov et al. 2024), section 5.3:
`<issue_start>Title: title\nusername_0: comment<issue_comment>username_1: comment …<issue_closed>…<|endoftext|>`.
Participants are numbered as bigcode-dataset does (preprocessing/utils/utils_issues.py, replace_usernames), except that
a name is replaced as a whole word: a participant called `a` leaves other words as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_training_toolkit.data.layouts.marked_content import InvalidLayoutRecord
from llm_training_toolkit.data.types import MarkedText
from llm_training_toolkit.families.document_layouts import ISSUE_CLOSED, ISSUE_COMMENT, ISSUE_START


class IssueEvent(NamedTuple):
    """Event of an issue: a comment of an author, or the closing of the issue."""

    author: str
    text: str
    is_closing: bool = False


_CLOSED = IssueEvent("", "", is_closing=True)
_UNKNOWN = "unknown"  # author of a deleted account; no name, so the word stays in the texts


def build_issue_segments(title: str, events: Sequence[IssueEvent]) -> tuple[MarkedText, ...]:
    """Build the segments of an issue, its authors as `username_0`, `username_1` in order of appearance."""
    authors = dict.fromkeys(event.author for event in events if not event.is_closing)
    numbered = {author: f"username_{number}" for number, author in enumerate(authors)}
    names = _compile_names([author for author in numbered if author != _UNKNOWN])
    hide = (lambda text: names.sub(lambda match: numbered[match[0]], text)) if names else (lambda text: text)
    segments, marker, lead = [], ISSUE_START, f"Title: {hide(title)}\n" if title else ""
    for event in events:
        if not event.is_closing:
            segments.append(MarkedText((marker,), f"{lead}{numbered[event.author]}: {hide(event.text)}"))
        elif segments:
            segments.append(MarkedText((ISSUE_CLOSED,), ""))
        if segments:
            marker, lead = ISSUE_COMMENT, ""
    return tuple(segments) or ((MarkedText((ISSUE_START,), lead.rstrip("\n")),) if lead else ())


def _compile_names(names: Sequence[str]) -> re.Pattern[str] | None:
    if not names:
        return None
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest_first))})(?![\w-])")


def parse_issue(values: Mapping[str, Any], title_field: str, events_field: str) -> tuple[MarkedText, ...]:
    """Return the segments of a record with `events` (The Stack's issues), or with `body` and `comments` (GitHub's).

    Raises InvalidLayoutRecord naming the invalid field.
    """
    if events_field in values:
        listed = _read_list(values, events_field)
        found = [event for each in listed for event in _parse_event(each, events_field)]
        titles = (each["title"] for each in listed if isinstance(each.get("title"), str) and each["title"])
        given = values.get(title_field)
        return build_issue_segments(given if isinstance(given, str) else next(titles, ""), found)
    if "body" not in values and "comments" not in values:
        raise InvalidLayoutRecord(
            f"has neither {events_field!r} nor 'body' (its fields are {sorted(map(str, values))[:8]})", "no_text"
        )
    return build_issue_segments(_read_text(values, title_field), list(_parse_github_issue(values)))


def _parse_event(event: Mapping[str, Any], field: str) -> Iterator[IssueEvent]:
    """Yield the event as a comment or a closing; edits, deletions and reopenings say nothing new and are left out."""
    action = event.get("action") or "created"
    if not isinstance(action, str):
        raise InvalidLayoutRecord(f"the action of an item of {field!r} is no string", "wrong_type")
    if action == "closed":
        yield _CLOSED
    if action not in {"created", "opened"}:
        return
    author = event.get("masked_author") or event.get("author") or _UNKNOWN
    text = next((event[key] for key in ("text", "comment", "description") if event.get(key)), "")
    if not isinstance(author, str) or not isinstance(text, str):
        raise InvalidLayoutRecord(f"an item of {field!r} has an author or a text that is no string", "wrong_type")
    if text.strip():
        yield IssueEvent(author, text)


def _parse_github_issue(values: Mapping[str, Any]) -> Iterator[IssueEvent]:
    given = values.get("comments")  # a number in GitHub's REST API, which has the comments at another address
    comments = _read_list(values, "comments") if given and not isinstance(given, int) else ()
    for part in (values, *comments):
        if text := _read_text(part, "body"):
            yield IssueEvent(_read_login(part), text)
    if str(values.get("state") or "").lower() == "closed" or values.get("closed") is True:
        yield _CLOSED


def _read_login(values: Mapping[str, Any]) -> str:
    author = values.get("author") or values.get("user") or ""
    login = author.get("login") if isinstance(author, Mapping) else author
    return login if isinstance(login, str) and login else _UNKNOWN  # GitHub has null for deleted accounts


def _read_text(values: Mapping[str, Any], field: str) -> str:
    text = values.get(field) or ""
    if not isinstance(text, str):
        raise InvalidLayoutRecord(f"the field {field!r} is {type(text).__name__}, not a string", "wrong_type")
    return text


def _read_list(values: Mapping[str, Any], field: str) -> Sequence[Mapping[str, Any]]:
    items = values[field]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise InvalidLayoutRecord(f"the field {field!r} is no list of objects", "wrong_type")
    return items
