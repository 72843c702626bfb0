"""Reads the values of a message in a record: role, text, tool calls, switches; says what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llm_training_toolkit.data.messages import Role, ToolCall, UnusableRecord

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
_SHOWN = 60


def named_role(item: Mapping[str, Any], where: str) -> tuple[Role, bool]:
    """Who speaks, and whether the content is a call of a tool (the role `function_call`)."""
    name = one_of(item, ("role", "from"), where, needed="no_role")
    if not isinstance(name, str) or name not in _ROLES:
        raise UnusableRecord(f"{where}: the role is {shown(name)}; known are {', '.join(_ROLES)}", "unknown_role")
    return _ROLES[name], name == "function_call"


def one_of(item: Mapping[str, Any], keys: tuple[str, ...], where: str, *, needed: str | None = None) -> Any:  # noqa: ANN401 - whatever the record holds
    """The value under one of several names for the same thing; None where there is none.

    Raises UnusableRecord where two names have different values, and under the reason `needed` where there is none.
    """
    found = {key: item[key] for key in keys if item.get(key) is not None}
    values = list(found.values())
    if any(value != values[0] for value in values[1:]):
        raise UnusableRecord(f"{where} has {' and '.join(found)}, which differ; leave one", "ambiguous")
    if not values and needed:
        fields = ", ".join(sorted(map(str, item))[:8]) or "none"
        raise UnusableRecord(f"{where} has no {' or '.join(keys)} (its fields: {fields})", needed)
    return values[0] if values else None


def check_text(value: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    """The value itself if it is text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise UnusableRecord(f"{where} is {shown(value)}, not text", "not_text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" alone is valid JSON and yet no text
        raise UnusableRecord(f"{where} is not text ({error.reason} at character {error.start})", "not_text") from error
    return value


def joined_text(value: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    """A text, or the text of a list of parts; parts that are no text (images) are refused."""
    if not isinstance(value, list | tuple):
        return check_text(value, where)
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(value))


def _part(part: Any, where: str) -> str:  # noqa: ANN401 - whatever the record holds
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and part.get("text") is not None:
        return check_text(part["text"], f"{where}.text")
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise UnusableRecord(f"{where} is {shown(kind)}, and only parts of type 'text' can be used", "not_text")


def loss_switch(item: Mapping[str, Any], role: Role, where: str) -> bool | None:
    """A message's own switch, `loss` or OpenAI's `weight`: true, false, 1 or 0; None where there is none."""
    value = one_of(item, ("loss", "weight"), where)
    if value is None:
        return None
    if not isinstance(value, bool | int | float) or value not in {0, 1}:
        raise UnusableRecord(f"{where}: loss is {shown(value)}; known are true, false, 1 and 0", "bad_loss")
    if role != "assistant":
        if value:
            raise UnusableRecord(f"{where}: asks for loss on the {role}; only the assistant's can bear it", "bad_loss")
        return None
    return bool(value)


def tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:  # noqa: ANN401 - whatever the record holds
    """The calls of a message: OpenAI's, Hugging Face's and Qwen's forms, in one or many."""
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(_call(_parsed(item), f"{where}.tool_calls[{number}]") for number, item in enumerate(items))


def _call(value: Any, where: str) -> ToolCall:  # noqa: ANN401 - whatever the record holds
    inner = value.get("function") if isinstance(value, Mapping) else None
    call = inner if isinstance(inner, Mapping) else value
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or not call["name"]:
        raise UnusableRecord(f"{where} is {shown(value)}, not an object with a name and arguments", "bad_tool_call")
    given = call.get("arguments")
    arguments = {} if given is None or given == "" else _parsed(given)
    if not isinstance(arguments, Mapping):
        raise UnusableRecord(f"{where}: the arguments are {shown(given)}, not a JSON object", "bad_tool_call")
    return ToolCall(check_text(call["name"], f"{where}.name"), _json(arguments, f"{where}.arguments"))


def tool_schemas(value: Any) -> tuple[str, ...]:  # noqa: ANN401 - whatever the record holds
    """The tools of a record: a list of JSON schemas, or such a list as JSON text."""
    tools = [] if value is None or value == "" else _parsed(value)
    if not isinstance(tools, list | tuple):
        raise UnusableRecord(f"tools is {shown(value)}, not a list of JSON schemas", "bad_tools")
    for number, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UnusableRecord(f"tools[{number}] is {shown(tool)}, not a JSON schema", "bad_tools")
    return tuple(_json(tool, f"tools[{number}]") for number, tool in enumerate(tools))


def _parsed(value: Any) -> Any:  # noqa: ANN401 - whatever the record holds
    """What JSON text says; anything else, and text that is not JSON, as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _json(value: Mapping[str, Any], where: str) -> str:
    """JSON text in the order of the record's keys: templates write it in that order, too."""
    try:
        return check_text(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, ValueError, RecursionError) as error:  # a date of a .parquet file
        raise UnusableRecord(f"{where} is not JSON ({error})", "not_text") from error


def shown(value: Any) -> str:  # noqa: ANN401 - whatever the record holds
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
