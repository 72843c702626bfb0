"""Renders the documents of every source in the way of its format: code and text, or conversations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.data.chat.messages import Conversation
from llm_training_toolkit.data.chat.render import ChatRules, render_chat
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.code.render import render
from llm_training_toolkit.data.code.rules import Rules
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Markers, TextEncoder
from llm_training_toolkit.data.types import Rendered


class Renderer:
    """Knows the tokenizer, its chat template and the family's markers; asked for one source at a time.

    The template is opened only where a source needs it: a tokenizer of code models may have a broken one.
    """

    def __init__(
        self, sources: Sequence[Source], markers: Markers, encoder: TextEncoder, tokenizer: Path, sequence_length: int
    ) -> None:
        self._sources, self._markers, self._encoder = sources, markers, encoder
        self._length = sequence_length
        chat = any(source.format == "chat" for source in sources)
        self._template = ChatTemplate.open(tokenizer, markers.chat_template) if chat else None

    def render(
        self, source: int, documents: Sequence[tuple[int, Document]], *, seed: int, epoch: int, plain: bool
    ) -> list[Rendered]:
        """Render numbered documents of a source; `plain` leaves out fill-in-the-middle.

        Raises DataError, naming the document, for what cannot be rendered.
        """
        chosen = self._sources[source]
        if self._template is not None and chosen.format == "chat":
            return render_chat(documents, self._chat_rules(chosen), self._encoder, self._template)
        chosen = chosen.model_copy(update={"fim": None}) if plain else chosen
        return render(documents, self._rules(chosen, seed=seed, epoch=epoch), self._encoder)

    def check(self) -> None:
        """Raise DataError where the tokenizer lacks a special token that a source needs; no document is looked at."""
        for source in self._sources:
            if source.format == "chat":
                self._chat_rules(source)
            else:
                self._rules(source, seed=0, epoch=0)

    def _rules(self, source: Source, *, seed: int, epoch: int) -> Rules:
        return Rules.of(source, self._markers, self._encoder, self._length, seed=seed, epoch=epoch)

    def _chat_rules(self, source: Source) -> ChatRules:
        too_long: Literal["drop", "continue", "error"] = "drop" if source.too_long == "auto" else source.too_long
        return ChatRules(self._length, self._encoder.id_of(self._markers.tokens.end_of_text), source.loss, too_long)


def plain_text(document: Document, source: Source) -> str:
    """What a tokenizer is trained on: the text of a document; of a conversation what is said, without its JSON."""
    if source.format != "chat":
        return document.text
    return "\n".join(message.content for message in Conversation.from_text(document.text).messages)
