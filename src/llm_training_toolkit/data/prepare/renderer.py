"""Rendering of the documents of every source by its format: code and text, or chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.messages import Conversation
from llm_training_toolkit.data.chat.prompt_templates import build_jinja_template, get_required_markers
from llm_training_toolkit.data.chat.render import ChatRules, render_chat
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.code.render import render_code
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.data.types import RenderedDocument


class DocumentRenderer:
    """Renders documents, one source at a time, with the tokenizer, its chat template and the family's special tokens.

    The template is opened only if a source needs it: the tokenizer of a code model may have a broken one.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        markers: TokenizationSpec,
        encoder: TextEncoder,
        tokenizer: Path,
        sequence_length: int,
        *,
        prompt_template: str | None = None,
    ) -> None:
        """`prompt_template` replaces the tokenizer's template, unless `tokenizer` holds it already."""
        self._sources, self._markers, self._encoder = sources, markers, encoder
        self._length = sequence_length
        self._required = get_required_markers(prompt_template)
        written = build_jinja_template(prompt_template, markers.tokens.end_of_text) if prompt_template else None
        chat = any(source.format == "chat" for source in sources)
        self._template = ChatTemplate.from_tokenizer(tokenizer, markers.chat_template, written) if chat else None

    def render_documents(
        self, source: int, documents: Sequence[tuple[int, Document]], *, seed: int, epoch: int, plain: bool
    ) -> list[RenderedDocument]:
        """Render numbered documents of a source; `plain` disables FIM.

        Raises DataError, naming the document, if it cannot be rendered.
        """
        chosen = self._sources[source]
        if self._template is not None and chosen.format == "chat":
            return render_chat(documents, self._build_chat_rules(chosen), self._encoder, self._template)
        chosen = chosen.model_copy(update={"fim": None}) if plain else chosen
        return render_code(documents, self._build_code_rules(chosen, seed=seed, epoch=epoch), self._encoder)

    def check_special_tokens(self) -> None:
        """Raise DataError if the tokenizer lacks a special token that a source needs; reads no document."""
        for marker in self._required:
            self._encoder.get_special_token_id(marker)
        for source in self._sources:
            if source.format == "chat":
                self._build_chat_rules(source)
            else:
                self._build_code_rules(source, seed=0, epoch=0)

    def _build_code_rules(self, source: SourceConfig, *, seed: int, epoch: int) -> RenderRules:
        return RenderRules.from_config(source, self._markers, self._encoder, self._length, seed=seed, epoch=epoch)

    def _build_chat_rules(self, source: SourceConfig) -> ChatRules:
        overlong: Literal["drop", "split", "window", "error"] = "drop" if source.overlong == "auto" else source.overlong
        return ChatRules(
            self._length, self._encoder.get_special_token_id(self._markers.tokens.end_of_text), source.loss, overlong
        )


def extract_plain_text(document: Document, source: SourceConfig) -> str:
    """Return a document's text for tokenizer training; of a conversation the message contents, without its JSON."""
    if source.format != "chat":
        return document.text
    messages = Conversation.from_text(document.text).messages
    return "\n".join(text for message in messages for text in (message.content, message.context) if text is not None)
