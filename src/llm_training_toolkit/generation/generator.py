"""Generation: completes a prompt, fills in the middle, or holds a conversation, piece by piece as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils.logging import disable_progress_bar

from llm_training_toolkit.data.chat.messages import Conversation, Message
from llm_training_toolkit.data.chat.render import prompt_tokens
from llm_training_toolkit.data.chat.template import ChatTemplate, has_template
from llm_training_toolkit.data.tokenizer import TextEncoder, open_tokenizer
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.families import FAMILIES
from llm_training_toolkit.models.load_exported import on_device, open_exported

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What the bytes of a character decode to before they are all there."""

Say = Callable[[str], object]
"""Takes a piece of text as soon as it is written."""


@dataclass(frozen=True)
class Sentinels:
    """The fill-in-the-middle markers of a family."""

    prefix: str
    suffix: str
    middle: str


@dataclass(frozen=True)
class Writing:
    """How something is written: most new tokens, fewer where the context ends; temperature 0 = always the likeliest."""

    tokens: int = 64
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """What the model wrote, and whether it ended by itself rather than at the most tokens."""

    text: str
    ended: bool


def _silent(_piece: str) -> None:
    """Say nothing."""


class Generator:
    """A model loaded for generation, with the tokenizer that lies in a directory."""

    def __init__(self, model: Any, tokenizer: Path) -> None:  # noqa: ANN401 - transformers has no types
        """`model` stops where its generation configuration says."""
        self._model, self._directory = model, tokenizer
        self._encoder: TextEncoder = open_tokenizer(str(tokenizer))

    @classmethod
    def open(cls, directory: Path, device: str = "cpu") -> Generator:
        """The model in an exported directory, whole or adapters. Raises CheckpointError where there is none."""
        disable_progress_bar()
        return cls(on_device(open_exported(directory), device), directory)

    def complete(self, prompt: str, how: Writing, say: Say = _silent) -> Written:
        """What the model writes after `prompt`. Marker text in it is text."""
        return self._continue(self._encoder.encode(prompt), how, self._ends(), say)

    def infill(self, prefix: str, suffix: str, how: Writing, say: Say = _silent) -> Written:
        """What the model writes between `prefix` and `suffix`, in prefix-suffix-middle order, up to a special token.

        Raises PlanError where the tokenizer has no sentinels.
        """
        sentinels = self._sentinels()
        marks = [self._encoder.id_of(name) for name in (sentinels.prefix, sentinels.suffix, sentinels.middle)]
        before, after = self._encoder.encode(prefix), self._encoder.encode(suffix)
        ids = [marks[0], *before, marks[1], *after, marks[2]]
        return self._continue(ids, how, [*self._ends(), *self._special()], say)

    def dialogue(self, system: str | None = None) -> Dialogue:
        """A conversation through the tokenizer's chat template. Raises PlanError where it has none."""
        if not has_template(self._directory):
            raise PlanError(
                f"{self._directory}: the tokenizer has no chat template, so nobody trained this model for "
                "conversations: leave out --chat, or train it on data of format chat"
            )
        return Dialogue(self, ChatTemplate.open(self._directory, ""), system)

    def answer(self, conversation: Conversation, template: ChatTemplate, how: Writing, say: Say) -> Written:
        """What the model answers. Raises PlanError where the template cannot write the conversation."""
        try:
            ids = prompt_tokens(conversation, template, self._encoder)
        except DataError as error:
            raise PlanError(f"{self._directory}: the chat template {error}") from error
        return self._continue(ids, how, self._ends(), say)

    def _sentinels(self) -> Sentinels:
        for family in FAMILIES.values():
            tokens = family.special_tokens
            names = (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
            if tokens.has_fim and all(map(self._encoder.knows, names)):
                return Sentinels(*names)
        raise PlanError(
            f"{self._directory}: the tokenizer has no fill-in-the-middle sentinels: this model cannot fill in the "
            "middle"
        )

    def _special(self) -> list[int]:
        """The special tokens of all families that the tokenizer has: there is none in code."""
        known = {token for family in FAMILIES.values() for token in family.special_tokens.all}
        return [self._encoder.id_of(token) for token in sorted(known) if self._encoder.knows(token)]

    def _ends(self) -> list[int]:
        """Where the model's files say that it stops."""
        ends = self._model.generation_config.eos_token_id
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @torch.no_grad()
    def _continue(self, ids: Sequence[int], how: Writing, ends: Sequence[int], say: Say) -> Written:
        limit = int(self._model.config.max_position_embeddings)
        if not ids:
            raise PlanError("the prompt is empty: give at least one character")
        if len(ids) >= limit:
            raise PlanError(
                f"the prompt has {len(ids):,} tokens, and the model's context has room for {limit - 1:,} and one new "
                "one: shorten it"
            )
        torch.manual_seed(how.seed)
        sampling = {"do_sample": True, "temperature": how.temperature} if how.temperature > 0 else {"do_sample": False}
        prompt = torch.tensor([list(ids)], device=self._model.device)
        pieces = _Pieces(self._encoder, frozenset(ends), say)
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(how.tokens, limit - len(ids)),
            eos_token_id=list(ends) or None,
            streamer=pieces,
            **sampling,
        )
        return Written(pieces.text, int(out[0, -1]) in ends)


class Dialogue:
    """A conversation that goes on: what was said before is part of every prompt."""

    def __init__(self, generator: Generator, template: ChatTemplate, system: str | None) -> None:
        self._generator, self._template = generator, template
        self.messages: tuple[Message, ...] = (Message("system", system),) if system is not None else ()
        """What was said."""

    def ask(self, text: str, how: Writing, say: Say = _silent) -> Written:
        """The answer to `text`, up to the end of the assistant's turn. Raises PlanError once the context is full."""
        asked = (*self.messages, Message("user", text))
        written = self._generator.answer(Conversation(asked), self._template, how, say)
        self.messages = (*asked, Message("assistant", written.text))
        return written


class _Pieces(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Says what is generated as soon as whole characters are there; special tokens are not said."""

    def __init__(self, encoder: TextEncoder, ends: frozenset[int], say: Say) -> None:
        self._encoder, self._ends, self._say = encoder, ends, say
        self._waiting: list[int] = []
        self._prompt_seen = False
        self.text = ""

    def put(self, value: torch.Tensor) -> None:
        """Tokens: the prompt first, then one at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._waiting += [token for token in value.flatten().tolist() if token not in self._ends]
        if not self._decoded().endswith(_UNFINISHED):
            self._flush()

    def end(self) -> None:
        """Say the rest, whole or not."""
        self._flush()

    def _decoded(self) -> str:
        return self._encoder.decode(self._waiting, skip_special_tokens=True)

    def _flush(self) -> None:
        piece = self._decoded()
        self._waiting.clear()
        if piece:
            self.text += piece
            self._say(piece)
