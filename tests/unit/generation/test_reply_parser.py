"""Answers are split into reasoning, text and tool calls, wherever the pieces of the stream end."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.generation.reply_parser import ReplyParser
from llm_training_toolkit.generation.text_stream import StopTextFilter

CALL = '<tool_call>\n{"name": "area", "arguments": {"width": 2}}\n</tool_call>'
BROKEN = '<tool_call>{"name": 3}</tool_call>'
HALF_PAIR = '<tool_call>{"name": "area", "arguments": {"unit": "\\ud83d"}}</tool_call>'
NOT_JSON = '<tool_call>{"name": "area", "arguments": {"width": NaN}}</tool_call>'


def parse(pieces: list[str], **options: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, text and calls of an answer."""
    parser = ReplyParser(**{"tools": True, **options})
    parts = [part for piece in pieces for part in parser.push_text(piece)] + list(parser.finish())
    calls = [part.tool_call["function"] for part in parts if part.tool_call is not None]
    assert parser.calls == len(calls)
    assert all(map(any, parts)), "an empty part"
    return (
        "".join(part.reasoning for part in parts),
        "".join(part.content for part in parts),
        [(call["name"], json.loads(call["arguments"])) for call in calls],
    )


@pytest.mark.parametrize(
    ("text", "options", "wanted"),
    [
        ("Hello", {}, ("", "Hello", [])),
        ("<think>\nSix.\n</think>\n\nIt is 6.", {}, ("\nSix.\n", "It is 6.", [])),
        ("Six.</think>6", {"thinking": True}, ("Six.", "6", [])),
        ("<think>endless", {}, ("endless", "", [])),
        ("<think>", {}, ("", "", [])),
        ("a <think> b", {}, ("", "a <think> b", [])),
        (CALL, {}, ("", "", [("area", {"width": 2})])),
        (f"<think>t</think>\n\nLook:\n{CALL}\n{CALL}", {}, ("t", "Look:\n", [("area", {"width": 2})] * 2)),
        (CALL, {"tools": False}, ("", CALL, [])),
        (BROKEN, {}, ("", BROKEN, [])),
        (HALF_PAIR, {}, ("", HALF_PAIR, [])),
        (NOT_JSON, {}, ("", NOT_JSON, [])),
        ("<tool_call>{open", {}, ("", "<tool_call>{open", [])),
        ("1 < 2 <tool", {}, ("", "1 < 2 <tool", [])),
    ],
)
def test_parts_do_not_depend_on_the_pieces(text: str, options: dict[str, bool], wanted: object) -> None:
    assert parse([text], **options) == wanted
    assert parse(list(text), **options) == wanted


@given(st.lists(st.text(alphabet="ab<\n", max_size=4)), st.lists(st.text(alphabet="ab<\n", min_size=1, max_size=3)))
def test_a_stop_text_is_found_in_any_pieces(pieces: list[str], stops: list[str]) -> None:
    stream = StopTextFilter(stops)
    shown = "".join(map(stream.push_text, pieces))
    shown += stream.flush()
    text = "".join(pieces)
    whole = StopTextFilter(stops)
    assert whole.push_text(text) + whole.flush() in {shown, text[: len(shown)]}
    assert not any(stop in shown for stop in stops)
    assert stream.stopped == any(stop in text for stop in stops)
