"""Fields of a message: role, text, tool calls, schemas of tools, override of the loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm_training_toolkit.data.chat.messages import InvalidRecord, Role, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


_MAX_REPR_LENGTH = 60


def parse_role(item: Mapping[str, Any], where: str) -> tuple[Role, bool]:
    """Return the role, and whether the content is a tool call (the role `function_call`)."""
    name = read_aliased_field(item, ("role", "from"), where, needed="no_role")
    if not isinstance(name, str) or name not in _ROLES:
        raise InvalidRecord(
            f"{where}: the role is {format_short_repr(name)}; known are {', '.join(_ROLES)}", "unknown_role"
        )
    return _ROLES[name], name == "function_call"


def read_aliased_field(item: Mapping[str, Any], keys: tuple[str, ...], where: str, *, needed: str | None = None) -> Any:  # noqa: ANN401 - whatever the record holds
    """Return the value under one of several alias keys, None if absent.

    Raises InvalidRecord if two aliases have different values, and with reason `needed` if all are absent.
    """
    found = {key: item[key] for key in keys if item.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise InvalidRecord(f"{where} has {' and '.join(found)}, which differ; leave one", "ambiguous")
    if not values and needed:
        fields = ", ".join(sorted(map(str, item))[:8]) or "none"
        raise InvalidRecord(f"{where} has no {' or '.join(keys)} (its fields: {fields})", needed)
    return values[0] if values else None


def check_text(value: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    """Return the value if it is text that can be encoded as UTF-8. Raises InvalidRecord otherwise."""
    if not isinstance(value, str):
        raise InvalidRecord(f"{where} is {format_short_repr(value)}, not text", "not_text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a lone "\ud800" is valid JSON but cannot be encoded
        raise InvalidRecord(f"{where} is not text ({error.reason} at character {error.start})", "not_text") from error
    return value


def join_text_parts(value: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    """Return a text, or the joined text of a list of parts. Raises InvalidRecord for other parts (images)."""
    if not isinstance(value, list | tuple):
        return check_text(value, where)
    return "".join(_read_text_part(part, f"{where}[{number}]") for number, part in enumerate(value))


def _read_text_part(part: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and part.get("text") is not None:
        return check_text(part["text"], f"{where}.text")
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InvalidRecord(f"{where} is {format_short_repr(kind)}, and only parts of type 'text' can be used", "not_text")


def parse_loss_override(item: Mapping[str, Any], role: Role, where: str) -> bool | None:
    """Return a message's own `loss` or OpenAI's `weight` (true, false, 1 or 0), None if absent."""
    value = read_aliased_field(item, ("loss", "weight"), where)
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in {0, 1}:
        raise InvalidRecord(f"{where}: loss is {format_short_repr(value)}; known are true, false, 1 and 0", "bad_loss")
    if role != "assistant":
        if value:
            raise InvalidRecord(f"{where}: asks for loss on the {role}; only the assistant's can bear it", "bad_loss")
        return None
    return bool(value)


def parse_tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:  # noqa: ANN401 - whatever the record holds
    """Return the tool calls of a message, one or many, in OpenAI's, Hugging Face's or Qwen's form."""
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(
        _parse_tool_call(_parse_if_json(item), f"{where}.tool_calls[{number}]") for number, item in enumerate(items)
    )


def _parse_tool_call(value: Any, where: str) -> ToolCall:  # noqa: ANN401 - whatever the record holds
    inner = value.get("function") if isinstance(value, Mapping) else None
    call = inner if isinstance(inner, Mapping) else value
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise InvalidRecord(
            f"{where} is {format_short_repr(value)}, not an object with a name and arguments", "bad_tool_call"
        )
    given = call.get("arguments")
    arguments = {} if given is None or given == "" else _parse_if_json(given)
    if not isinstance(arguments, Mapping):
        raise InvalidRecord(
            f"{where}: the arguments are {format_short_repr(given)}, not a JSON object", "bad_tool_call"
        )
    return ToolCall(check_text(call["name"], f"{where}.name"), _dump_json(arguments, f"{where}.arguments"))


def parse_tool_schemas(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - whatever the record holds
    """Return the tools of a record, a list of JSON schemas or such a list as JSON text."""
    tools = [] if value is None or value == "" else _parse_if_json(value)
    if not isinstance(tools, list | tuple):
        raise InvalidRecord(f"tools is {format_short_repr(value)}, not a list of JSON schemas", "bad_tools")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRecord(f"tools[{number}] is {format_short_repr(tool)}, not a JSON schema", "bad_tools")
    return tuple(_dump_json(tool, f"tools[{number}]") for number, tool in enumerate(tools))


def _parse_if_json(value: Any) -> Any:  # noqa: ANN401 - whatever the record holds
    """Return the value of JSON text. Other values and texts are returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _dump_json(value: Mapping[str, Any], where: str) -> str:
    """Return JSON text in the record's key order, the order in which templates write it."""
    try:
        return check_text(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError, RecursionError) as error:  # a date of a .parquet file
        raise InvalidRecord(f"{where} is not JSON ({error})", "not_text") from error


def format_short_repr(value: Any) -> str:  # noqa: ANN401 - whatever the record holds
    """Return a repr short enough for an error message."""
    text = repr(value)
    return text if len(text) <= _MAX_REPR_LENGTH else text[: _MAX_REPR_LENGTH - 1] + "…"
