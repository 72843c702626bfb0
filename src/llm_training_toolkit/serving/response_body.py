"""Bodies of responses: OpenAI's objects for whole answers, and their chunks as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from llm_training_toolkit.generation.reply_parser import ReplyPart

DONE_EVENT = "data: [DONE]\n\n"


def format_event(values: Mapping[str, Any]) -> str:
    """Return a server-sent event with a JSON object."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


class ResponseWriter:
    """Writes the objects of one answer, which share an id, a time and the model's name."""

    def __init__(self, model: str, *, chat: bool) -> None:
        kind = "chat.completion" if chat else "text_completion"
        self._chat = chat
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def build_completion(self, text: str, reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return a whole text completion."""
        return {**self._base, "choices": [_build_text_choice(text, reason)], "usage": usage}

    def build_chat(self, parts: list[ReplyPart], reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return a whole chat answer from its parts."""
        content = "".join(part.content for part in parts)
        calls = [part.tool_call for part in parts if part.tool_call is not None]
        message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
        if reasoning := "".join(part.reasoning for part in parts):
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = [{key: call[key] for key in call if key != "index"} for call in calls]
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._base, "choices": [choice], "usage": usage}

    def build_first_chunk(self) -> dict[str, Any]:
        """Return the first chunk of a chat answer, which gives the role."""
        return self._build_delta({"role": "assistant", "content": ""}, None)

    def build_part_chunk(self, part: ReplyPart) -> dict[str, Any]:
        """Return the chunk of a part of a chat answer."""
        if part.tool_call is not None:
            return self._build_delta({"tool_calls": [part.tool_call]}, None)
        if part.reasoning:
            return self._build_delta({"reasoning_content": part.reasoning}, None)
        return self._build_delta({"content": part.content}, None)

    def build_text_chunk(self, text: str) -> dict[str, Any]:
        """Return the chunk of a piece of a text completion."""
        return {**self._base, "choices": [_build_text_choice(text, None)]}

    def build_last_chunk(self, reason: str) -> dict[str, Any]:
        """Return the chunk with the reason of the end."""
        if self._chat:
            return self._build_delta({}, reason)
        return {**self._base, "choices": [_build_text_choice("", reason)]}

    def build_usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the chunk that counts tokens; it has no choices."""
        kind = self._base["object"]
        return {**self._base, "object": f"{kind}.chunk" if self._chat else kind, "choices": [], "usage": usage}

    def _build_delta(self, delta: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._base, "object": f"{self._base['object']}.chunk", "choices": [choice]}


def build_usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }


def _build_text_choice(text: str, reason: str | None) -> dict[str, Any]:
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
