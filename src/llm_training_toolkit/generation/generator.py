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
from llm_training_toolkit.generation.reply_parser import THINK_OPEN, parse_reply
from llm_training_toolkit.generation.text_stream import TokenDecoder
from llm_training_toolkit.models.load_exported import load_exported_model, move_to_device
from llm_training_toolkit.models.sampling import Completion, SamplingParams, set_generation_config

TextCallback = Callable[[str], object]  # receives each piece of text once generated


@dataclass(frozen=True)
class FimSentinels:
    """Fill-in-the-middle sentinels of a family."""

    prefix: str
    suffix: str
    middle: str


@dataclass(frozen=True)
class TokenizedPrompt:
    """Prompt as token ids, and the ids that end its answer."""

    ids: Sequence[int]
    end_ids: frozenset[int]


class TextGenerator:
    """Model for generation, with the tokenizer from a directory."""

    def __init__(self, model: Any, tokenizer: Path) -> None:  # noqa: ANN401 - transformers has no types
        """`model` stops at the `eos_token_id` of its generation configuration, of which nothing else is used."""
        self.model, self.directory = model, tokenizer
        ends, self.pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
        self._eos_ids = frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)
        self.encoder: TextEncoder = open_tokenizer(str(tokenizer))

    @classmethod
    def from_directory(cls, directory: Path, device: str = "cpu") -> TextGenerator:
        """Load an exported model or adapters. Raises CheckpointError if the directory holds neither."""
        disable_progress_bar()
        return cls(move_to_device(load_exported_model(directory), device), directory)

    @property
    def context_length(self) -> int:
        """Tokens of the model's context, prompt and answer together."""
        return int(self.model.config.max_position_embeddings)

    def complete_prompt(self, prompt: str, how: SamplingParams, say: TextCallback | None = None) -> Completion:
        """Generate a continuation of `prompt`. Special-token text in it is encoded as plain text."""
        return self._generate_completion(self.tokenize_prompt(prompt), how, say)

    def fill_middle(self, prefix: str, suffix: str, how: SamplingParams, say: TextCallback | None = None) -> Completion:
        """Generate the middle, prompting in prefix-suffix-middle order, up to any special token.

        Raises PlanError if the tokenizer has no sentinels.
        """
        return self._generate_completion(self.tokenize_gap(prefix, suffix), how, say)

    def tokenize_prompt(self, prompt: str) -> TokenizedPrompt:
        """Return the tokens of a prompt to continue."""
        return TokenizedPrompt(self.encoder.encode(prompt), self._eos_ids)

    def tokenize_gap(self, prefix: str, suffix: str) -> TokenizedPrompt:
        """Return the tokens of a gap to fill, in prefix-suffix-middle order.

        Raises PlanError if the tokenizer has no sentinels.
        """
        sentinels = self._find_fim_sentinels()
        marks = [
            self.encoder.get_special_token_id(name) for name in (sentinels.prefix, sentinels.suffix, sentinels.middle)
        ]
        before, after = self.encoder.encode(prefix), self.encoder.encode(suffix)
        ids = [marks[0], *before, marks[1], *after, marks[2]]
        return TokenizedPrompt(ids, self._eos_ids | set(self._get_special_token_ids()))

    def tokenize_conversation(self, conversation: Conversation, template: ChatTemplate) -> TokenizedPrompt:
        """Return the tokens of a conversation and the header of the next answer.

        Raises PlanError if the template cannot render the conversation.
        """
        try:
            ids = encode_prompt(conversation, template, self.encoder)
        except DataError as error:
            raise PlanError(f"{self.directory}: the chat template {error}") from error
        return TokenizedPrompt(ids, self._eos_ids)

    def check_prompt_length(self, prompt: TokenizedPrompt) -> None:
        """Raise PlanError for an empty prompt, and for one that leaves no room in the context."""
        if not prompt.ids:
            raise PlanError("the prompt is empty: give at least one character")
        if len(prompt.ids) >= self.context_length:
            raise PlanError(
                f"the prompt has {len(prompt.ids):,} tokens, and the model's context has room for "
                f"{self.context_length - 1:,} and one new one: shorten it"
            )

    def start_chat(self, system: str | None = None) -> ChatSession:
        """Start a conversation with the tokenizer's chat template. Raises PlanError without a template."""
        if not has_template(self.directory):
            raise PlanError(
                f"{self.directory}: the tokenizer has no chat template, so nobody trained this model for "
                "conversations: leave out --chat, or train it on data of format chat"
            )
        return ChatSession(self, ChatTemplate.from_tokenizer(self.directory, ""), system)

    def opens_thinking(self, prompt: TokenizedPrompt) -> bool:
        """Return whether a prompt ends with the tag that opens reasoning, as some chat templates write it."""
        return self.encoder.decode(prompt.ids[-8:]).rstrip().endswith(THINK_OPEN)

    def generate_reply(self, prompt: TokenizedPrompt, how: SamplingParams, say: TextCallback | None) -> Completion:
        """Generate the next message of a conversation, special tokens such as `<think>` written out."""
        return self._generate_completion(prompt, how, say, written_ids=self.encoder.special_token_ids)

    def has_fim_sentinels(self) -> bool:
        """Return whether the tokenizer has the fill-in-the-middle sentinels of a family."""
        return self._search_fim_sentinels() is not None

    def _search_fim_sentinels(self) -> FimSentinels | None:
        for family in FAMILIES.values():
            tokens = family.special_tokens
            names = (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
            if tokens.has_fim and all(map(self.encoder.has_special_token, names)):
                return FimSentinels(*names)
        return None

    def _find_fim_sentinels(self) -> FimSentinels:
        found = self._search_fim_sentinels()
        if found is None:
            raise PlanError(
                f"{self.directory}: the tokenizer has no fill-in-the-middle sentinels: this model cannot fill in the "
                "middle"
            )
        return found

    def _get_special_token_ids(self) -> list[int]:
        """Return the tokenizer's special tokens of all families, none of which occur in code."""
        known = {token for family in FAMILIES.values() for token in family.special_tokens.all}
        return [
            self.encoder.get_special_token_id(token) for token in sorted(known) if self.encoder.has_special_token(token)
        ]

    @torch.no_grad()
    def _generate_completion(
        self,
        prompt: TokenizedPrompt,
        how: SamplingParams,
        say: TextCallback | None,
        written_ids: frozenset[int] = frozenset(),
    ) -> Completion:
        self.check_prompt_length(prompt)
        torch.manual_seed(how.seed)
        room, ends = self.context_length - len(prompt.ids), prompt.end_ids
        set_generation_config(self.model, how, room=room, eos_ids=sorted(ends), pad_id=self.pad_id)
        ids = torch.tensor([list(prompt.ids)], device=self.model.device)
        pieces = _CallbackStreamer(TokenDecoder(self.encoder, written_ids), ends, say)
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=pieces)
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
        prompt = self._generator.tokenize_conversation(Conversation(asked), self._template)
        written = self._generator.generate_reply(prompt, how, say)
        reply = parse_reply(written.text, thinking=self._generator.opens_thinking(prompt))
        self.messages = (*asked, reply)
        return written


class _CallbackStreamer(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Passes text to a callback as soon as its characters are complete; end tokens are skipped."""

    def __init__(self, decoder: TokenDecoder, ends: frozenset[int], say: TextCallback | None) -> None:
        self._decoder, self._ends, self._say = decoder, ends, say
        self._prompt_seen = False
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Receive token ids: first the prompt, then one id per call."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for token in value.flatten().tolist():
            if token not in self._ends:
                self._write_text(self._decoder.push_token(token))

    def end(self) -> None:
        """Flush the rest, including an incomplete character."""
        self._write_text(self._decoder.flush())

    def _write_text(self, piece: str) -> None:
        if piece:
            self.text += piece
            if self._say is not None:
                self._say(piece)
