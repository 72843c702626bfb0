"""Splits a chat answer into reasoning, text and tool calls while it is generated.

Reasoning is between `<think>` and `</think>` at the beginning, a call is a JSON object between `<tool_call>` and
`</tool_call>`: the form of Hermes, Qwen2.5 and Qwen3. Anything else stays text.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any, NamedTuple

from llm_training_toolkit.data.chat.messages import ChatMessage
from llm_training_toolkit.generation.text_stream import count_partial_match

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
REPLY_TAGS = (THINK_OPEN, THINK_CLOSE, CALL_OPEN, CALL_CLOSE)


class ReplyPart(NamedTuple):
    """Piece of an answer. At most one of the three is given."""

    content: str = ""
    reasoning: str = ""
    tool_call: dict[str, Any] | None = None


class ReplyParser:
    """Receives text piece by piece; an end that may become a tag is held back."""

    def __init__(self, *, tools: bool, thinking: bool = False) -> None:
        """`tools`: the request offers tools; without, their tags are text. `thinking`: the prompt opened reasoning."""
        self._tools = tools
        self._held = ""
        self._state = "thinking" if thinking else "start"
        self._spoken = False
        self.calls = 0
        """Tool calls so far."""

    def push_text(self, piece: str) -> Iterator[ReplyPart]:
        """Yield the parts that the piece completes."""
        self._held += piece
        before = ("", 0)
        while self._held and before != (before := (self._state, len(self._held))):
            yield from self._read_step()

    def finish(self) -> Iterator[ReplyPart]:
        """Yield the rest, at the end of the answer; an open call is text."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            if held:
                yield ReplyPart(reasoning=held)
        else:
            yield from self._speak((CALL_OPEN if self._state == "call" else "") + held)

    def _read_step(self) -> Iterator[ReplyPart]:
        """Consume held text up to the next tag."""
        if self._state == "start":
            self._read_start()
        elif self._state == "thinking":
            reasoning, ends = self._take_until(THINK_CLOSE)
            if reasoning:
                yield ReplyPart(reasoning=reasoning)
            if ends:
                self._state = "text"
        elif self._state == "call":
            body, closed, rest = self._held.partition(CALL_CLOSE)
            if closed:
                self._held, self._state = rest, "text"
                yield from self._close_call(body)
        else:
            text, opens_call = self._take_until(CALL_OPEN) if self._tools else (self._take_all(), False)
            yield from self._speak(text)
            if opens_call:
                self._state = "call"

    def _read_start(self) -> None:
        """Decide whether the answer begins with reasoning."""
        text = self._held.lstrip()
        if text.startswith(THINK_OPEN):
            self._held, self._state = text.removeprefix(THINK_OPEN), "thinking"
        elif not THINK_OPEN.startswith(text):
            self._state = "text"

    def _take_all(self) -> str:
        text, self._held = self._held, ""
        return text

    def _take_until(self, tag: str) -> tuple[str, bool]:
        """Take the text before a tag, and whether the tag has come; its beginning at the end is held back."""
        text, found, rest = self._held.partition(tag)
        if found:
            self._held = rest
            return text, True
        shown = len(text) - count_partial_match(text, tag)
        self._held = text[shown:]
        return text[:shown], False

    def _speak(self, text: str) -> Iterator[ReplyPart]:
        """Yield text. Line breaks that templates write around reasoning and calls are dropped."""
        if not self._spoken:
            text = text.lstrip("\n")
        if self.calls and not text.strip():
            return
        if text:
            self._spoken = True
            yield ReplyPart(content=text)

    def _close_call(self, body: str) -> Iterator[ReplyPart]:
        """Yield a call, or its text if it is none."""
        call = parse_tool_call(body)
        if call is None:
            yield from self._speak(f"{CALL_OPEN}{body}{CALL_CLOSE}")
            return
        name, arguments = call
        function = {"name": name, "arguments": arguments}
        yield ReplyPart(
            tool_call={
                "index": self.calls,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": function,
            }
        )
        self.calls += 1


def parse_reply(text: str, *, thinking: bool) -> ChatMessage:
    """Return a whole answer as a message, its reasoning apart: templates drop that of earlier turns.

    Tags of tool calls stay text. `thinking`: the prompt opened reasoning.
    """
    parser = ReplyParser(tools=False, thinking=thinking)
    parts = [*parser.push_text(text), *parser.finish()]
    reasoning = "".join(part.reasoning for part in parts)
    return ChatMessage("assistant", "".join(part.content for part in parts), thinking=reasoning or None)


def parse_tool_call(body: str) -> tuple[str, str] | None:
    """Return the name and the arguments (JSON text) of a call; None if the text is no call.

    NaN, which JSON lacks, and half a surrogate pair, which UTF-8 lacks, are in no call.
    """
    try:
        call = json.loads(body)
        name, arguments = (call.get("name"), call.get("arguments", {})) if isinstance(call, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            return None
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        (name + written).encode()
    except (ValueError, RecursionError):
        return None
    return name, written
