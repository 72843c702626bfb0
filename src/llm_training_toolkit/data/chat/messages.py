"""Conversation types, and the canonical text by which conversations are stored, hashed and held out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


class InvalidRecord(Exception):  # noqa: N818 - what is wrong with a record, not yet an error of the run
    """Error for a record that is not a conversation: `why` as text, `reason` as a short key to count it under.

    The caller adds file and line.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.why, self.reason = why, reason


@dataclass(frozen=True)
class ToolCall:
    """Tool call of the assistant: the tool's name and its arguments, a JSON object as text.

    Arguments are text because the model also learns the order of their keys.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """Chat message. `thinking` is the assistant's reasoning before its answer.

    `context` is the input that belongs to a user's prompt, kept apart for prompt templates with a place for it.
    `loss` turns the loss of an assistant message on or off, overriding the source's setting (None: no override).
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    loss: bool | None = None
    context: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools the assistant may call, each a JSON schema as text."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[str, ...] = ()

    def without_loss_overrides(self) -> Conversation:
        """Return the conversation without `loss` overrides, so that it equals others that differ only in them."""
        return replace(self, messages=tuple(replace(message, loss=None) for message in self.messages))

    def to_text(self) -> str:
        """Return canonical compact JSON: equal conversations have equal texts. Tools keep the order of their keys."""
        values: dict[str, Any] = {"messages": [_message_to_dict(message) for message in self.messages]}
        if self.tools:
            values["tools"] = list(self.tools)
        return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Conversation:
        """Read the output of `to_text`. Raises InvalidRecord for anything else."""
        try:
            values = json.loads(text)
            messages = tuple(_message_from_dict(each) for each in values["messages"])
            return cls(messages, tuple(values.get("tools", ())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRecord(f"is not the text of a conversation ({error!r})", "not_a_conversation") from error


def _message_to_dict(message: ChatMessage) -> dict[str, Any]:
    """Return the fields of a message that are set."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    for key in ("thinking", "name", "loss", "context"):
        if getattr(message, key) is not None:
            values[key] = getattr(message, key)
    if message.tool_calls:
        values["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return values


def _message_from_dict(values: Mapping[str, Any]) -> ChatMessage:
    calls = tuple(ToolCall(**call) for call in values.get("tool_calls", ()))
    return ChatMessage(**{**values, "tool_calls": calls})
