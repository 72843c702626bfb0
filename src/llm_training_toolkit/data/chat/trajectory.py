"""Agents' trajectories: calls and results of tools are paired, and steps that failed are found.

Shapes of the records (messages alone; everything else is what `parse` reads anyway):

    OpenHands (nebius/SWE-rebench-openhands-trajectories, SWE-Gym): `tool_calls` with ids, results with `tool_call_id`;
    its shell ends a result with `[Command finished with exit code N]`, its editor begins an error with `ERROR:`.
    SWE-agent, SWE-smith (SWE-bench/SWE-smith-trajectories): messages as JSON text, results with a list `tool_call_ids`.
    mini-swe-agent (`trajectory_format: mini-swe-agent-1.1`): results, or in version 1 the user's messages, with
    `<returncode>N</returncode>` and `extra.returncode`; a last message of the role `exit`, which the model never sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from llm_training_toolkit.data.chat.messages import ChatMessage, InvalidRecord

BOOKKEEPING_ROLE = "exit"
_EXIT_CODE_FIELDS = ("returncode", "exit_code")
_EXIT_CODES_IN_TEXT = (
    re.compile(r"\A\s*<returncode>\s*(-?\d+)\s*</returncode>"),
    re.compile(r"\[(?:The command completed|Command finished) with exit code (-?\d+)\.?\]\s*\Z"),
)
_SUCCESS = frozenset({"0", "0.0"})  # tables may hold the code as a number with a point, or as text
_ERROR_TEXT = re.compile(r"\A\s*ERROR:")


def check_tool_results(items: Sequence[Mapping[str, Any]], messages: Sequence[ChatMessage], key: str) -> None:
    """Raise InvalidRecord if calls and results do not fit: one without the other, or ids that differ.

    items: the raw messages (N), for their ids; messages: the same ones parsed. Calls of the last turn may lack results,
    because a run ends with them. Without any call in `tool_calls` nothing is checked: calls may be part of the text.
    """
    if not any(message.tool_calls for message in messages):
        return
    owner = 0
    for number, message in enumerate(messages):
        if message.role != "tool":
            owner = number
        elif not messages[owner].tool_calls:
            raise InvalidRecord(f"{key}[{number}] is the result of a tool that was not called", "result_without_call")
    last = max(number for number, message in enumerate(messages) if message.role == "assistant")
    for number, message in enumerate(messages):
        if message.tool_calls:
            results = list(takewhile(lambda at: messages[at].role == "tool", range(number + 1, len(messages))))
            if len(results) > len(message.tool_calls):
                raise InvalidRecord(
                    f"{key}[{results[len(message.tool_calls)]}] is one result more than message {number} has calls",
                    "result_without_call",
                )
            _check_result_ids(items, number, results, key)
            if len(results) < len(message.tool_calls) and (number != last or number + len(results) + 1 < len(messages)):
                raise InvalidRecord(
                    f"{key}[{number}] calls {len(message.tool_calls)} tools and {len(results)} results follow",
                    "call_without_result",
                )


def _check_result_ids(items: Sequence[Mapping[str, Any]], number: int, results: Sequence[int], key: str) -> None:
    """Check the ids of the results of one turn, as far as both sides have ids."""
    calls = items[number].get("tool_calls")
    listed = calls if isinstance(calls, list | tuple) else [calls]
    left = [str(call["id"]) for call in listed if isinstance(call, Mapping) and call.get("id") not in (None, "")]
    if len(left) < len(listed):
        return
    for result in results:
        for name in _get_result_ids(items[result]):
            if name not in left:
                raise InvalidRecord(
                    f"{key}[{result}] answers the call {name!r}, and open are {', '.join(left) or 'none'}",
                    "tool_call_id",
                )
            left.remove(name)


def _get_result_ids(item: Mapping[str, Any]) -> list[str]:
    several = item.get("tool_call_ids")
    names = several if isinstance(several, list | tuple) else [item.get("tool_call_id")]
    return [str(name) for name in names if name not in (None, "")]


def mask_failed_steps(items: Sequence[Mapping[str, Any]], messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Return the messages, assistant turns that a failed result follows without loss.

    A turn's results are the tool results after it, or else the user's next message. A `loss` that a turn sets stays.
    """
    found = list(messages)
    for number, message in enumerate(messages):
        if message.role != "assistant" or message.loss is not None:
            continue
        after = range(number + 1, len(messages))
        results = list(takewhile(lambda at: messages[at].role == "tool", after)) or [
            at for at in after[:1] if messages[at].role == "user"
        ]
        if any(_has_failed(items[at], messages[at].content) for at in results):
            found[number] = replace(message, loss=False)
    return found


def _has_failed(item: Mapping[str, Any], text: str) -> bool:
    """Return whether a result says that it failed: by a field, an exit code other than 0, or its text."""
    extra = item.get("extra")
    facts = [item, *([extra] if isinstance(extra, Mapping) else [])]
    if item.get("is_error") is not None:
        return bool(item["is_error"])
    codes = [each[field] for field in _EXIT_CODE_FIELDS for each in facts if each.get(field) is not None]
    codes = codes or [match[1] for pattern in _EXIT_CODES_IN_TEXT if (match := pattern.search(text))]
    if any(str(code).strip() not in _SUCCESS for code in codes):
        return True
    return item.get("role") == "tool" and not codes and bool(_ERROR_TEXT.match(text))
