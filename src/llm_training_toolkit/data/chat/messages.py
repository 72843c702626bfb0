"""A conversation as the data layer knows it, and its text: what is stored, hashed and held out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


class InvalidRecord(Exception):  # noqa: N818 - what is wrong with a record, not yet an error of the run
    """A record that is no conversation: `why` in words, and `reason`, a short key to count it under.

    Whoever reads the records adds file and line.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.why, self.reason = why, reason


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes: the tool's name and its arguments, a JSON object as text.

    Arguments are text because the order of their keys is part of what the model learns.
    """

    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """One message. `thinking` is an assistant's reasoning before its answer.

    `loss` switches the loss of an assistant message on or off, whatever the source says; None = as the source says.
    """

    role: Role
    content: str
    thinking: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    loss: bool | None = None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools the assistant may call, each a JSON schema as text."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[str, ...] = ()

    def without_loss_overrides(self) -> Conversation:
        """What is said, whatever of it is trained on: two that differ in that alone are one conversation."""
        return replace(self, messages=tuple(replace(message, loss=None) for message in self.messages))

    def to_text(self) -> str:
        """Canonical compact JSON: equal conversations have equal texts. It keeps the order of keys in tools."""
        values: dict[str, Any] = {"messages": [_message_to_dict(message) for message in self.messages]}
        if self.tools:
            values["tools"] = list(self.tools)
        return json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Conversation:
        """Read what `to_text` wrote. Raises UnusableRecord for anything else."""
        try:
            values = json.loads(text)
            messages = tuple(_message_from_dict(each) for each in values["messages"])
            return cls(messages, tuple(values.get("tools", ())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidRecord(f"is not the text of a conversation ({error!r})", "not_a_conversation") from error


def _message_to_dict(message: ChatMessage) -> dict[str, Any]:
    """What a message says, without what it does not say."""
    values: dict[str, Any] = {"role": message.role, "content": message.content}
    for key in ("thinking", "name", "loss"):
        if getattr(message, key) is not None:
            values[key] = getattr(message, key)
    if message.tool_calls:
        values["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    return values


def _message_from_dict(values: Mapping[str, Any]) -> ChatMessage:
    calls = tuple(ToolCall(**call) for call in values.get("tool_calls", ()))
    return ChatMessage(**{**values, "tool_calls": calls})
