"""Parser for the usual shapes of conversations in records.

    Messages (OpenAI, Hugging Face, StarChat, Qwen1.5 and Qwen2.5-Coder): `messages` with role, content.
    Conversations (Qwen, ShareGPT): `conversations` or `conversation` with from, value.
    Trajectories of agents: `messages` or `trajectory`, a list or its JSON text; see `trajectory`.
    Prompt and completion (TRL, OpenAI): `prompt` with `completion` or `response`, texts or lists of messages.
    Instruction (Alpaca, StarCoder2 self-align): `instruction`, `input` with `output` or `response`; `history`.
    Question and answer (GSM8K, OpenOrca): `question` with `answer` or `response`.

`ConversationFields` names other columns, and chooses where a record has several shapes. All shapes may have `system`
(or `system_prompt`), `tools`, and Qwen2.5-Coder's `only_last_turn_loss`. Other fields and null fields are ignored.
The first and the last role are unrestricted here; a chat template may reject them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_training_toolkit.data.chat.message_fields import (
    _parse_if_json,
    check_text,
    join_text_parts,
    parse_loss_override,
    parse_role,
    parse_tool_calls,
    parse_tool_schemas,
    read_aliased_field,
)
from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation, InvalidRecord, Role, ToolCall
from llm_training_toolkit.data.chat.trajectory import BOOKKEEPING_ROLE, check_tool_results, mask_failed_steps

__all__ = ["ChatMessage", "Conversation", "InvalidRecord", "ToolCall", "parse_conversation"]

_MESSAGE_LIST_FIELDS = ("messages", "conversations", "conversation", "trajectory")
_PROMPT_ANSWER_FIELDS = {
    "prompt": ("completion", "response"),
    "instruction": ("output", "response"),
    "question": ("answer", "response"),
}
_SYSTEM_FIELDS = ("system", "system_prompt")
_MAY_BE_EMPTY = frozenset({"system", "tool"})


@dataclass(frozen=True)
class ConversationFields:
    """Columns of a conversation as far as they are named, and how it is read.

    keeps_context: a prompt's context stays apart from it. masks_failed_steps: turns with a failed result bear no loss.
    """

    prompt: str | None = None
    context: str | None = None
    completion: str | None = None
    system: str | None = None
    messages: str | None = None
    keeps_context: bool = False
    masks_failed_steps: bool = False

    @property
    def given(self) -> dict[str, str]:
        """The columns that were named, by field."""
        named = {key: getattr(self, key) for key in ("prompt", "context", "completion", "system", "messages")}
        return {key: name for key, name in named.items() if name is not None}


_USUAL_FIELDS = ConversationFields()


def parse_conversation(record: Mapping[str, Any], fields: ConversationFields = _USUAL_FIELDS) -> Conversation:
    """Return the conversation of a record.

    Raises InvalidRecord for zero or several conversations, an unknown role, a missing or empty text (system texts and
    tool results may be empty), and a conversation without an assistant message.
    """
    if not isinstance(record, Mapping):
        raise InvalidRecord(f"is {type(record).__name__}, not an object", "not_an_object")
    for name in fields.given.values():
        if name not in record:
            raise InvalidRecord(format_missing_column(name, record), "no_field")
    keys = _find_conversation_fields(record, fields)
    messages = (
        _parse_trajectory(record, keys[0], fields)
        if len(keys) == 1
        else _parse_prompt_and_answer(record, fields, *keys)
    )
    messages = _prepend_system_message(record, fields, messages)
    if not any(message.role == "assistant" for message in messages):
        raise InvalidRecord(f"{keys[0]}: no message is the assistant's, so there is nothing to learn", "no_assistant")
    return Conversation(tuple(_apply_last_turn_loss(record, messages)), parse_tool_schemas(record.get("tools")))


def format_missing_column(name: str, columns: Iterable[Any]) -> str:
    """Say that a record has no such column, with the nearest of those it has."""
    there = sorted(map(str, columns))
    near = difflib.get_close_matches(name, there, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"has no column {name!r} ({meant}its columns are {', '.join(there[:12]) or 'none'})"


def _find_conversation_fields(record: Mapping[str, Any], fields: ConversationFields) -> tuple[str, ...]:
    """Return the fields that hold the conversation: one with a list, or a question and its answer."""
    if fields.messages:
        return (fields.messages,)
    shapes: list[tuple[str, ...]] = (
        []
        if fields.given.keys() & {"prompt", "context", "completion"}
        else [(key,) for key in _MESSAGE_LIST_FIELDS if record.get(key) is not None]
    )
    shapes += _find_prompt_shapes(record, fields)
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        found = " and ".join("/".join(shape) for shape in shapes)
        lines = " or ".join(dict.fromkeys(_format_fields_line(shape) for shape in shapes))
        raise InvalidRecord(
            f"holds more than one conversation ({found}); say which one in the source: {lines}", "ambiguous"
        )
    usual = [*_MESSAGE_LIST_FIELDS, *("/".join((asks, answers[0])) for asks, answers in _PROMPT_ANSWER_FIELDS.items())]
    raise InvalidRecord(
        f"holds no conversation: its fields are {sorted(map(str, record))[:8]}, needed is one of {', '.join(usual)}, "
        "or name them in the source: fields: {prompt: …, completion: …}",
        "unknown_shape",
    )


def _find_prompt_shapes(record: Mapping[str, Any], fields: ConversationFields) -> list[tuple[str, ...]]:
    """Return the pairs of a question and its answer that the named columns leave. A named column may be null."""
    asked = [fields.prompt] if fields.prompt else [key for key in _PROMPT_ANSWER_FIELDS if record.get(key) is not None]
    every_answer = tuple(dict.fromkeys(answer for answers in _PROMPT_ANSWER_FIELDS.values() for answer in answers))
    shapes: list[tuple[str, ...]] = []
    for asks in asked:
        answers = _PROMPT_ANSWER_FIELDS.get(asks, every_answer)
        named = [fields.completion] if fields.completion else [key for key in answers if record.get(key) is not None]
        shapes += [(asks, answer) for answer in named]
    return shapes


def _format_fields_line(shape: tuple[str, ...]) -> str:
    named = {"messages": shape[0]} if len(shape) == 1 else {"prompt": shape[0], "completion": shape[1]}
    return "fields: {" + ", ".join(f"{key}: {name}" for key, name in named.items()) + "}"


def _parse_trajectory(record: Mapping[str, Any], key: str, fields: ConversationFields) -> list[ChatMessage]:
    """Parse a list of messages, or its JSON text. Raises InvalidRecord for calls and results that do not fit."""
    items = _parse_if_json(record[key])
    if isinstance(items, list | tuple):
        items = [item for item in items if not (isinstance(item, Mapping) and item.get("role") == BOOKKEEPING_ROLE)]
    messages = _parse_message_list({key: items}, key)
    check_tool_results(items, messages, key)
    return mask_failed_steps(items, messages) if fields.masks_failed_steps else messages


def _parse_message_list(record: Mapping[str, Any], key: str) -> list[ChatMessage]:
    items = record[key]
    if not isinstance(items, list | tuple):
        raise InvalidRecord(f"{key} is {type(items).__name__}, not a list of messages", "not_a_list")
    if not items:
        raise InvalidRecord(f"{key} is empty", "no_messages")
    return [_parse_message(item, f"{key}[{number}]") for number, item in enumerate(items)]


def _parse_prompt_and_answer(
    record: Mapping[str, Any], fields: ConversationFields, asks: str, answers: str
) -> list[ChatMessage]:
    """Parse a question and its answer, each a text or a list of messages, after any `history`."""
    messages = _parse_history(record.get("history")) if asks == "instruction" else []
    if isinstance(record[asks], str | None):  # a named column may be null
        messages.append(_build_prompt_message(record, fields, asks))
    else:  # assistant messages in a prompt are context, without loss by default
        given = _parse_message_list(record, asks)
        messages += [replace(m, loss=bool(m.loss)) if m.role == "assistant" else m for m in given]
    if isinstance(record[answers], str | None):
        return [*messages, _build_text_message("assistant", record[answers], answers)]
    return messages + _parse_message_list(record, answers)


def _build_prompt_message(record: Mapping[str, Any], fields: ConversationFields, asks: str) -> ChatMessage:
    """Build the user's message from a question and the context that belongs to it."""
    column = fields.context or ("input" if asks == "instruction" else None)
    context = None if column is None or record.get(column) is None else check_text(record[column], column)
    if context is None or fields.keeps_context:
        return replace(_build_text_message("user", record[asks], asks), context=context or None)
    question = "" if record[asks] is None else check_text(record[asks], asks)
    return _build_text_message("user", "\n".join(text for text in (question, context) if text), asks)


def _parse_history(pairs: Any) -> list[ChatMessage]:  # noqa: ANN401 - whatever the record holds
    messages: list[ChatMessage] = []
    if pairs is not None and not isinstance(pairs, list | tuple):
        raise InvalidRecord(f"history is {type(pairs).__name__}, not a list of pairs of texts", "not_a_list")
    for number, pair in enumerate(pairs or ()):
        where = f"history[{number}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InvalidRecord(f"{where} is not a pair of texts: what was asked, what was answered", "not_a_list")
        messages += [_build_text_message("user", pair[0], where), _build_text_message("assistant", pair[1], where)]
    return messages


def _build_text_message(role: Role, text: Any, where: str) -> ChatMessage:  # noqa: ANN401 - whatever the record holds
    return _check_not_empty(ChatMessage(role, "" if text is None else check_text(text, where)), where)


def _parse_message(item: Any, where: str) -> ChatMessage:  # noqa: ANN401 - whatever the record holds
    if not isinstance(item, Mapping):
        raise InvalidRecord(f"{where} is {type(item).__name__}, not an object with a role and content", "not_an_object")
    role, content_is_call = parse_role(item, where)
    loss = parse_loss_override(item, role, where)
    if content_is_call:
        call = read_aliased_field(item, ("content", "value"), where, needed="no_content")
        return ChatMessage(role, "", tool_calls=parse_tool_calls([call], where), loss=loss)
    speaks = role == "assistant"
    calls = parse_tool_calls(read_aliased_field(item, ("tool_calls", "function_call"), where), where) if speaks else ()
    content = read_aliased_field(item, ("content", "value"), where, needed=None if calls else "no_content")
    thinking = read_aliased_field(item, ("reasoning_content", "reasoning", "thinking"), where) if speaks else None
    name = item.get("name")
    return _check_not_empty(
        ChatMessage(
            role,
            "" if content is None else join_text_parts(content, f"{where}.content"),
            None if thinking is None else check_text(thinking, f"{where}.reasoning_content"),
            calls,
            None if name is None else check_text(name, f"{where}.name"),
            loss,
        ),
        where,
    )


def _check_not_empty(message: ChatMessage, where: str) -> ChatMessage:
    if message.role in _MAY_BE_EMPTY or message.tool_calls or message.content.strip():
        return message
    raise InvalidRecord(f"{where}: the {message.role}'s text is empty", "empty_message")


def _prepend_system_message(
    record: Mapping[str, Any], fields: ConversationFields, messages: list[ChatMessage]
) -> list[ChatMessage]:
    system = read_aliased_field(record, (fields.system,) if fields.system else _SYSTEM_FIELDS, "the record")
    if system is None or system == "":
        return messages
    if messages[0].role == "system":
        raise InvalidRecord("has a system text of its own and a first message from the system; leave one", "ambiguous")
    return [ChatMessage("system", check_text(system, "system")), *messages]


def _apply_last_turn_loss(record: Mapping[str, Any], messages: list[ChatMessage]) -> list[ChatMessage]:
    """Apply Qwen2.5-Coder's per-record switch: earlier answers have loss only if they set it themselves."""
    if record.get("only_last_turn_loss") is not True:
        return messages
    last = max(number for number, message in enumerate(messages) if message.role == "assistant")
    return [
        replace(message, loss=False)
        if message.role == "assistant" and number < last and message.loss is None
        else message
        for number, message in enumerate(messages)
    ]
