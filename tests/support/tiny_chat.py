"""Tiny tokenizers of the families with chat templates, and readable views of what renders with them.

Expected results are written as text, with [[loss]] in brackets.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import transformers

from llm_training_toolkit.data.chat.parse import parse_conversation
from llm_training_toolkit.data.chat.render import ChatRules, render_chat
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.data.types import RenderedDocument
from llm_training_toolkit.families import FAMILIES

TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""What Qwen3's own tokenizer has besides the markers of its family."""
_TEXTS = [
    "<|im_start|>assistant\nThe answer is 42.\n\n",
    "user\nWhat is 6 * 7?\n",
    "### Response\ndef f(x):\n    return x\n\n",
]
RECORD: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "6*7?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Because."},
    ]
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}
AGENT: dict[str, Any] = {
    "tools": [WEATHER],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "reasoning_content": "A greeting."},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "Look it up.",
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"in":"Bonn","at":1}'}}],
        },
        {"role": "tool", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ],
}


class Chat:
    """A tiny tokenizer of a family with a chat template, and what renders with them."""

    def __init__(self, path: Path, family: str, source: str | None = None) -> None:
        chosen = FAMILIES[family]
        tokens = chosen.special_tokens
        tokens = replace(tokens, all=tokens.all + (TAGS if family == "qwen3" else ()))
        train_tokenizer(
            _TEXTS, len(tokens.all) + 300, replace(TokenizationSpec.from_family(chosen), tokens=tokens), path
        )
        self.path, self.source = path, source or chosen.chat_template
        (path / "chat_template.jinja").write_text(self.source, encoding="utf-8")
        self.encoder: TextEncoder = open_tokenizer(str(path))
        self.template = ChatTemplate.from_tokenizer(path, "")
        self.end = self.encoder.get_special_token_id(tokens.end_of_text)
        self.theirs = transformers.AutoTokenizer.from_pretrained(path)

    def render(self, record: Any, name: str = "chats.jsonl:3", **rules: Any) -> RenderedDocument:
        document = Document(0, name, parse_conversation(record).to_text())
        chosen = ChatRules(**{"sequence_length": 10_000, "end_of_text": self.end, **rules})
        return render_chat([(7, document)], chosen, self.encoder, self.template)[0]

    def ids(self, record: Any, **rules: Any) -> list[int]:
        tokens: list[int] = self.render(record, **rules).examples[0].tokens.tolist()
        return tokens

    def marked(self, record: Any, **rules: Any) -> str:
        """The text of the rendered tokens, loss in brackets."""
        (example,) = self.render(record, **rules).examples
        pairs = zip(example.tokens.tolist(), example.loss.tolist(), strict=True)
        runs = [
            (loss, self.encoder.decode([token for token, _ in run])) for loss, run in groupby(pairs, lambda p: p[1])
        ]
        return "".join(f"[[{text}]]" if loss else text for loss, text in runs)

    def said(self, record: Any, **rules: Any) -> str:
        """The text of the tokens with loss alone."""
        (example,) = self.render(record, **rules).examples
        return self.encoder.decode(example.tokens[example.loss])

    def theirs_ids(self, messages: list[dict[str, Any]], tools: list[Any] | None = None) -> list[int]:
        found: list[int] = self.theirs.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
        return found


class ChatMaker:
    """Makes chats, each kind once."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        self._folders = folders
        self._made: dict[tuple[str, str | None], Chat] = {}

    def __call__(self, family: str, source: str | None = None) -> Chat:
        if (family, source) not in self._made:
            self._made[family, source] = Chat(self._folders.mktemp("chat"), family, source)
        return self._made[family, source]
