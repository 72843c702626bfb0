"""Text generation: prompt completion, fill-in-the-middle and chat, streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from llm_training_toolkit.data.chat.messages import ChatMessage, Conversation
from llm_training_toolkit.data.chat.render import encode_prompt
from llm_training_toolkit.data.chat.template import ChatTemplate, has_template
from llm_training_toolkit.data.tokenizer import TextEncoder, open_tokenizer
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.families import FAMILIES
from llm_training_toolkit.models.load_exported import load_exported_model, move_to_device
from llm_training_toolkit.models.sampling import Completion, SamplingParams, set_generation_config

# Decoded from the bytes of a character until all of them are generated.
_INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"

TextCallback = Callable[[str], object]  # receives each piece of text once generated


@dataclass(frozen=True)
class FimSentinels:
    """Fill-in-the-middle sentinels of a family."""

    prefix: str
    suffix: str
    middle: str


class TextGenerator:
    """Model for generation, with the tokenizer from a directory."""

    def __init__(self, model: Any, tokenizer: Path) -> None:  # noqa: ANN401 - transformers has no types
        """`model` stops at the `eos_token_id` of its generation configuration, of which nothing else is used."""
        self._model, self._directory = model, tokenizer
        ends, self._pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
        self._eos_ids: list[int] = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._encoder: TextEncoder = open_tokenizer(str(tokenizer))

    @classmethod
    def from_directory(cls, directory: Path, device: str = "cpu") -> TextGenerator:
        """Load an exported model or adapters. Raises CheckpointError if the directory holds neither."""
        disable_progress_bar()
        return cls(move_to_device(load_exported_model(directory), device), directory)

    def complete_prompt(self, prompt: str, how: SamplingParams, say: TextCallback | None = None) -> Completion:
        """Generate a continuation of `prompt`. Special-token text in it is encoded as plain text."""
        return self._generate_completion(self._encoder.encode(prompt), how, self._eos_ids, say)

    def fill_middle(self, prefix: str, suffix: str, how: SamplingParams, say: TextCallback | None = None) -> Completion:
        """Generate the middle, prompting in prefix-suffix-middle order, up to any special token.

        Raises PlanError if the tokenizer has no sentinels.
        """
        sentinels = self._find_fim_sentinels()
        marks = [
            self._encoder.get_special_token_id(name) for name in (sentinels.prefix, sentinels.suffix, sentinels.middle)
        ]
        before, after = self._encoder.encode(prefix), self._encoder.encode(suffix)
        ids = [marks[0], *before, marks[1], *after, marks[2]]
        return self._generate_completion(ids, how, [*self._eos_ids, *self._get_special_token_ids()], say)

    def start_chat(self, system: str | None = None) -> ChatSession:
        """Start a conversation with the tokenizer's chat template. Raises PlanError without a template."""
        if not has_template(self._directory):
            raise PlanError(
                f"{self._directory}: the tokenizer has no chat template, so nobody trained this model for "
                "conversations: leave out --chat, or train it on data of format chat"
            )
        return ChatSession(self, ChatTemplate.from_tokenizer(self._directory, ""), system)

    def generate_reply(
        self, conversation: Conversation, template: ChatTemplate, how: SamplingParams, say: TextCallback | None
    ) -> Completion:
        """Generate the next message. Raises PlanError if the template cannot render the conversation."""
        try:
            ids = encode_prompt(conversation, template, self._encoder)
        except DataError as error:
            raise PlanError(f"{self._directory}: the chat template {error}") from error
        return self._generate_completion(ids, how, self._eos_ids, say)

    def _find_fim_sentinels(self) -> FimSentinels:
        for family in FAMILIES.values():
            tokens = family.special_tokens
            names = (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
            if tokens.has_fim and all(map(self._encoder.has_special_token, names)):
                return FimSentinels(*names)
        raise PlanError(
            f"{self._directory}: the tokenizer has no fill-in-the-middle sentinels: this model cannot fill in the "
            "middle"
        )

    def _get_special_token_ids(self) -> list[int]:
        """Return the tokenizer's special tokens of all families, none of which occur in code."""
        known = {token for family in FAMILIES.values() for token in family.special_tokens.all}
        return [
            self._encoder.get_special_token_id(token)
            for token in sorted(known)
            if self._encoder.has_special_token(token)
        ]

    @torch.no_grad()
    def _generate_completion(
        self, ids: Sequence[int], how: SamplingParams, ends: Sequence[int], say: TextCallback | None
    ) -> Completion:
        limit = int(self._model.config.max_position_embeddings)
        if not ids:
            raise PlanError("the prompt is empty: give at least one character")
        if len(ids) >= limit:
            raise PlanError(
                f"the prompt has {len(ids):,} tokens, and the model's context has room for {limit - 1:,} and one new "
                "one: shorten it"
            )
        torch.manual_seed(how.seed)
        set_generation_config(self._model, how, room=limit - len(ids), eos_ids=ends, pad_id=self._pad_id)
        prompt = torch.tensor([list(ids)], device=self._model.device)
        pieces = _CallbackStreamer(self._encoder, frozenset(ends), say)
        out = self._model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=pieces)
        return Completion(pieces.text, int(out[0, -1]) in ends)


class ChatSession:
    """Conversation. Every prompt contains all earlier messages."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, system: str | None) -> None:
        self._generator, self._template = generator, template
        self.messages: tuple[ChatMessage, ...] = (ChatMessage("system", system),) if system is not None else ()
        """Messages so far."""

    def send_message(self, text: str, how: SamplingParams, say: TextCallback | None = None) -> Completion:
        """Generate the reply to `text`, up to the end of the turn. Raises PlanError once the context is full."""
        asked = (*self.messages, ChatMessage("user", text))
        written = self._generator.generate_reply(Conversation(asked), self._template, how, say)
        self.messages = (*asked, ChatMessage("assistant", written.text))
        return written


class _CallbackStreamer(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Passes text to a callback as soon as its characters are complete; special tokens are skipped."""

    def __init__(self, encoder: TextEncoder, ends: frozenset[int], say: TextCallback | None) -> None:
        self._encoder, self._ends, self._say = encoder, ends, say
        self._pending_ids: list[int] = []
        self._prompt_seen = False
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Receive token ids: first the prompt, then one id per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._pending_ids += [token for token in value.flatten().tolist() if token not in self._ends]
        if not self._decode_pending().endswith(_INCOMPLETE_CHARACTER):
            self._flush_text()

    def end(self) -> None:
        """Flush the rest, including an incomplete character."""
        self._flush_text()

    def _decode_pending(self) -> str:
        return self._encoder.decode(self._pending_ids, skip_special_tokens=True)

    def _flush_text(self) -> None:
        piece = self._decode_pending()
        self._pending_ids.clear()
        if piece:
            self.text += piece
            if self._say is not None:
                self._say(piece)
