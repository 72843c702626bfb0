"""Agents' trajectories: calls and results of tools are paired, and steps that failed are found.

Shapes of the records (messages alone; everything else is what `parse` reads anyway):

    OpenHands (nebius/SWE-rebench-openhands-trajectories, SWE-Gym): `tool_calls` with ids, results with `tool_call_id`;
    its shell ends a result with `[Command finished with exit code N]`, its editor begins an error with `ERROR:`.
    SWE-agent, SWE-smith (SWE-bench/SWE-smith-trajectories): messages as JSON text, results with a list `tool_call_ids`.
    mini-swe-agent (`trajectory_format: mini-swe-agent-1.1`): results, or in version 1 the user's messages, with
    `<returncode>N</returncode>` and `extra.returncode`. A last message of the role `exit`, which the model never sees.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, takewhile
from typing import Any

from llm_training_toolkit.data.chat.messages import ChatMessage, InvalidRecord

BOOKKEEPING_ROLE = "exit"
_EXIT_CODE_FIELDS = ("returncode", "exit_code")
_EXIT_CODES_IN_TEXT = (
    re.compile(r"\A\s*<returncode>\s*(-?\d+)\s*</returncode>"),
    re.compile(r"\[(?:The command completed|Command finished) with exit code (-?\d+)\.?\]\s*\Z"),
)
# Tables may hold a code or a flag as a number with a point, or as text, and pandas writes NaN for an absent value.
_SUCCESS = frozenset({"0", "0.0"})
_FALSE = frozenset({"false", "no", *_SUCCESS})
_ABSENT = frozenset({"", "none", "null", "nan"})
_BOOLEANS = frozenset({"true", "false"})  # no exit codes: their meaning differs between agents
_ERROR_TEXT = re.compile(r"\A\s*ERROR:")


def check_tool_results(items: Sequence[Mapping[str, Any]], messages: Sequence[ChatMessage], key: str) -> None:
    """Raise InvalidRecord for a call or result alone, or for ids that differ.

    items: the raw messages (N), for their ids; messages: the same ones parsed. Calls of the last turn may lack results,
    because a run ends with them. Checks only records with `tool_calls`: calls may also be part of the text.
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
            answered = [len(_get_result_ids(items[at])) or 1 for at in results]  # one message may answer several calls
            for at, total in zip(results, accumulate(answered), strict=True):
                if total > len(message.tool_calls):
                    raise InvalidRecord(
                        f"{key}[{at}] is one result more than message {number} has calls", "result_without_call"
                    )
            _check_result_ids(items, number, results, key)
            is_end = number == last and number + len(results) + 1 == len(messages)
            if sum(answered) < len(message.tool_calls) and not is_end:
                raise InvalidRecord(
                    f"{key}[{number}] calls {len(message.tool_calls)} tools and {sum(answered)} results follow",
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
    return [str(name) for name in names if _read_fact(name) not in _ABSENT]


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
        if any(_has_failed(items[at], messages[at]) for at in results):
            found[number] = replace(message, loss=False)
    return found


def _has_failed(item: Mapping[str, Any], message: ChatMessage) -> bool:
    """Return whether a result says that it failed: by a field, an exit code other than 0, or its text."""
    extra = item.get("extra")
    facts = [item, *([extra] if isinstance(extra, Mapping) else [])]
    flag = _read_fact(item.get("is_error"))
    if flag not in _ABSENT:
        return flag not in _FALSE
    codes = [_read_fact(each.get(field)) for field in _EXIT_CODE_FIELDS for each in facts]
    codes = [code for code in codes if code not in _ABSENT | _BOOLEANS]
    codes = codes or [match[1] for pattern in _EXIT_CODES_IN_TEXT if (match := pattern.search(message.content))]
    if any(code not in _SUCCESS for code in codes):
        return True
    return message.role == "tool" and not codes and bool(_ERROR_TEXT.match(message.content))


def _read_fact(value: Any) -> str:  # noqa: ANN401 - whatever the record holds
    """Return a flag or a code as lower-case text; absent values are among `_ABSENT`."""
    return str(value).strip().lower()
