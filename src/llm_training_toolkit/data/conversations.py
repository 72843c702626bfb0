"""Recognises the conversation in a record, whichever of the usual shapes it has.

| shape | fields |
|---|---|
| messages (OpenAI, Hugging Face, StarChat, Qwen1.5 and Qwen2.5-Coder) | `messages`: role, content |
| conversations (Qwen, ShareGPT) | `conversations` or `conversation`: from, value |
| prompt and completion (TRL, OpenAI) | `prompt` with `completion` or `response`: texts, or lists of messages |
| instruction (Alpaca, StarCoder2 self-align) | `instruction`, `input` with `output` or `response`; `history` |
| question and answer (GSM8K, OpenOrca) | `question` with `answer` or `response` |

Beside each: `system` (or `system_prompt`), `tools`, and Qwen2.5-Coder's `only_last_turn_loss`. Other fields are
ignored, and so are fields that are null. Who speaks first and who speaks last is free: the template may object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_training_toolkit.data.message_values import (
    check_text,
    joined_text,
    loss_switch,
    named_role,
    one_of,
    tool_calls,
    tool_schemas,
)
from llm_training_toolkit.data.messages import Conversation, Message, Role, ToolCall, UnusableRecord

__all__ = ["Conversation", "Message", "ToolCall", "UnusableRecord", "conversation_of"]

_LISTS = ("messages", "conversations", "conversation")
_PAIRS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
}
_SYSTEM = ("system", "system_prompt")
_MAY_BE_EMPTY = frozenset({"system", "tool"})


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """The conversation of a record.

    Raises UnusableRecord where there is none or two, where a message has an unknown role, no text or empty text
    (a system text and a tool's answer may be empty), and where the assistant says nothing.
    """
    if not isinstance(record, Mapping):
        raise UnusableRecord(f"is {type(record).__name__}, not an object", "not_an_object")
    keys = _shape(record)
    messages = _listed(record, keys[0]) if len(keys) == 1 else _pair(record, *keys)
    messages = _with_system(record, messages)
    if not any(message.role == "assistant" for message in messages):
        raise UnusableRecord(f"{keys[0]}: no message is the assistant's, so there is nothing to learn", "no_assistant")
    return Conversation(tuple(_last_turn_only(record, messages)), tool_schemas(record.get("tools")))


def _shape(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that hold the conversation: one with a list, or a question and its answer."""
    shapes: list[tuple[str, ...]] = [(key,) for key in _LISTS if record.get(key) is not None]
    for asks, answers in _PAIRS.items():
        if record.get(asks) is not None:
            shapes += [(asks, answer) for answer in answers if record.get(answer) is not None]
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        found = " and ".join("/".join(shape) for shape in shapes)
        raise UnusableRecord(f"holds more than one conversation ({found}); leave one of them", "ambiguous")
    usual = [*_LISTS, *("/".join((asks, answers[0])) for asks, answers in _PAIRS.items())]
    raise UnusableRecord(
        f"holds no conversation: its fields are {sorted(map(str, record))[:8]}, needed is one of {', '.join(usual)}",
        "unknown_shape",
    )


def _listed(record: Mapping[str, Any], key: str) -> list[Message]:
    items = record[key]
    if not isinstance(items, list | tuple):
        raise UnusableRecord(f"{key} is {type(items).__name__}, not a list of messages", "not_a_list")
    if not items:
        raise UnusableRecord(f"{key} is empty", "no_messages")
    return [_message(item, f"{key}[{number}]") for number, item in enumerate(items)]


def _pair(record: Mapping[str, Any], asks: str, answers: str) -> list[Message]:
    """A question and its answer, each a text or a list of messages, with what came before."""
    messages = _history(record.get("history")) if asks == "instruction" else []
    if isinstance(record[asks], str):
        messages.append(_spoken("user", _question(record, asks), asks))
    else:  # what stands in a prompt is given, not to be learnt, whoever said it
        given = _listed(record, asks)
        messages += [replace(m, loss=bool(m.loss)) if m.role == "assistant" else m for m in given]
    if isinstance(record[answers], str):
        return [*messages, _spoken("assistant", record[answers], answers)]
    return messages + _listed(record, answers)


def _question(record: Mapping[str, Any], asks: str) -> str:
    if asks != "instruction" or record.get("input") is None:
        return str(record[asks])
    texts = (record[asks], check_text(record["input"], "input"))
    return "\n".join(text for text in texts if text)


def _history(pairs: Any) -> list[Message]:  # noqa: ANN401 - whatever the record holds
    messages: list[Message] = []
    if pairs is not None and not isinstance(pairs, list | tuple):
        raise UnusableRecord(f"history is {type(pairs).__name__}, not a list of pairs of texts", "not_a_list")
    for number, pair in enumerate(pairs or ()):
        where = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnusableRecord(f"{where} is not a pair of texts: what was asked, what was answered", "not_a_list")
        messages += [_spoken("user", pair[0], where), _spoken("assistant", pair[1], where)]
    return messages


def _spoken(role: Role, text: Any, where: str) -> Message:  # noqa: ANN401 - whatever the record holds
    return _filled(Message(role, check_text(text, where)), where)


def _message(item: Any, where: str) -> Message:  # noqa: ANN401 - whatever the record holds
    if not isinstance(item, Mapping):
        raise UnusableRecord(
            f"{where} is {type(item).__name__}, not an object with a role and content", "not_an_object"
        )
    role, content_is_call = named_role(item, where)
    loss = loss_switch(item, role, where)
    if content_is_call:
        call = one_of(item, ("content", "value"), where, needed="no_content")
        return Message(role, "", tool_calls=tool_calls([call], where), loss=loss)
    speaks = role == "assistant"
    calls = tool_calls(one_of(item, ("tool_calls", "function_call"), where), where) if speaks else ()
    content = one_of(item, ("content", "value"), where, needed=None if calls else "no_content")
    thinking = one_of(item, ("reasoning_content", "reasoning", "thinking"), where) if speaks else None
    name = item.get("name")
    return _filled(
        Message(
            role,
            "" if content is None else joined_text(content, f"{where}.content"),
            None if thinking is None else check_text(thinking, f"{where}.reasoning_content"),
            calls,
            None if name is None else check_text(name, f"{where}.name"),
            loss,
        ),
        where,
    )


def _filled(message: Message, where: str) -> Message:
    if message.role in _MAY_BE_EMPTY or message.tool_calls or message.content.strip():
        return message
    raise UnusableRecord(f"{where}: the {message.role}'s text is empty", "empty_message")


def _with_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    system = one_of(record, _SYSTEM, "the record")
    if system is None or system == "":
        return messages
    if messages[0].role == "system":
        raise UnusableRecord("has a system text of its own and a first message from the system; leave one", "ambiguous")
    return [Message("system", check_text(system, "system")), *messages]


def _last_turn_only(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """Qwen2.5-Coder's switch for a whole record: earlier answers bear no loss unless they say so themselves."""
    if record.get("only_last_turn_loss") is not True:
        return messages
    last = max(number for number, message in enumerate(messages) if message.role == "assistant")
    return [
        replace(message, loss=False)
        if message.role == "assistant" and number < last and message.loss is None
        else message
        for number, message in enumerate(messages)
    ]
