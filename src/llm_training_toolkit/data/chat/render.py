"""Rendering of conversations into examples: tokens of the chat template, and loss on the assistant's turns.

1. Tokens are those of transformers' `apply_chat_template` up to the end of the last turn. Later output (a line break,
   the beginning of another turn) is dropped. The end of a turn is an end, so no end of text is added.
   A template without an end-of-turn marker (plain words) gets the family's end of text after a last answer.
2. Special tokens are those that the template writes. Their text within a message, a tool or an argument stays text.
3. Loss `assistant` covers the assistant's turns, from after the header through the end-of-turn marker.
   Turns include the thinking that the template keeps, the empty thinking that it writes, tool calls and the answer.
   A token that is partly header and partly answer has loss, because the model has to generate it.
4. Loss `last_turn` covers only the last message of the assistant. A message's own `loss` overrides both.
5. Loss `all` covers every token but the first, the results of tools and turns whose own `loss` is off.
6. `overlong: window` cuts a long conversation between turns (`windows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.chat.messages import Conversation, InvalidRecord
from llm_training_toolkit.data.chat.template import ChatTemplate, RenderedChat
from llm_training_toolkit.data.chat.windows import ConversationWindow, TokenSpan, cut_into_windows
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import EncodedText, TextEncoder
from llm_training_toolkit.data.types import Example, RenderedDocument
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class ChatRules:
    """Inputs of rendering besides the conversation, the tokenizer and its template.

    `end_of_text`: id that ends a conversation if the template has no end-of-turn marker.
    """

    sequence_length: int
    end_of_text: int
    loss: Literal["assistant", "last_turn", "all"] = "assistant"
    overlong: Literal["drop", "split", "window", "error"] = "drop"


class _RenderedTokens(NamedTuple):
    """Token ids (L,) uint32, loss mask (L,) bool, and mask of tokens at which a character begins (L,) bool."""

    ids: NDArray[np.uint32]
    loss: NDArray[np.bool_]
    starts_character: NDArray[np.bool_]


class _EncodingSpan(NamedTuple):
    """Characters [start, stop) of a script that are encoded together: a marker, or the text between markers."""

    start: int
    stop: int
    is_marker: bool


def render_chat(
    documents: Sequence[tuple[int, Document]], rules: ChatRules, encoder: TextEncoder, template: ChatTemplate
) -> list[RenderedDocument]:
    """Render numbered conversations. Each result depends only on its conversation and the rules.

    Raises DataError naming the document if its text is not a conversation, if the template rejects it, or if it is too
    long with `overlong` set to `error`.
    """
    read = [_apply_template(document, template) for _, document in documents]
    tokens = _encode_scripts(
        [(chat, script, _build_loss_mask(chat, script, rules.loss)) for chat, script in read], rules, encoder
    )
    rendered = []
    for (number, document), (conversation, script), whole in zip(documents, read, tokens, strict=True):
        if rules.overlong == "window" and len(whole.ids) > rules.sequence_length:
            render = _WindowRenderer(document, template, rules, encoder)
            answers = _find_answer_tokens(script, encoder)
            windows = cut_into_windows(conversation, answers, render.count_tokens, rules.sequence_length)
            examples = [render.build_example(number, window) for window in windows or ()]
            kept = [example for example in examples if example.loss.any()]
        else:
            kept = examples = _split_into_examples(number, document, whole, rules)
        if not any(example.loss.any() for example in examples):
            rendered.append(RenderedDocument(number, len(whole.ids), [], "no_loss" if examples else "too_long"))
        else:
            rendered.append(RenderedDocument(number, len(whole.ids), kept))
    return rendered


def _encode_scripts(
    scripts: Sequence[tuple[Conversation, RenderedChat, NDArray[np.bool_]]], rules: ChatRules, encoder: TextEncoder
) -> list[_RenderedTokens]:
    """Encode rendered conversations with their masks of characters with loss, in one batch."""
    pieces = [_split_at_markers(script) for _, script, _ in scripts]
    texts = [
        script.text[piece.start : piece.stop]
        for (_, script, _), cut in zip(scripts, pieces, strict=True)
        for piece in cut
        if not piece.is_marker
    ]
    encoded = iter(encoder.encode_batch(texts))
    tokens = []
    for (conversation, script, mask), cut in zip(scripts, pieces, strict=True):
        spans = [_encode_span(piece, script, mask, encoder, encoded) for piece in cut]
        tokens.append(_concatenate_tokens(spans + _build_closing_tokens(conversation, script, mask, rules, encoder)))
    return tokens


def _find_answer_tokens(script: RenderedChat, encoder: TextEncoder) -> list[TokenSpan]:
    """Return the tokens of each answer, those that the template writes after it excluded."""
    pieces = _split_at_markers(script)
    texts = [script.text[piece.start : piece.stop] for piece in pieces if not piece.is_marker]
    encoded = iter(encoder.encode_batch(texts))
    starts = np.concatenate(
        [[piece.start] if piece.is_marker else piece.start + next(encoded).char_spans[:, 0] for piece in pieces]
    )
    spans = [
        (min(turn.start for turn in turns), max(turn.stop for turn in turns))
        for turns in (list(group) for _, group in groupby(script.turns, lambda turn: turn.message))
    ]
    return [TokenSpan(*np.searchsorted(starts, span).tolist()) for span in spans]


@dataclass(frozen=True)
class _WindowRenderer:
    """Renders windows of one conversation, each as a conversation of its own."""

    document: Document
    template: ChatTemplate
    rules: ChatRules
    encoder: TextEncoder

    def count_tokens(self, window: ConversationWindow) -> int:
        return len(self._render(window).ids)

    def build_example(self, number: int, window: ConversationWindow) -> Example:
        tokens = self._render(window)
        return _build_example(number, tokens, 0, len(tokens.ids))

    def _render(self, window: ConversationWindow) -> _RenderedTokens:
        script = _render_script(self.document, window.conversation, self.template)
        conversation, loss = window.conversation, self.rules.loss
        if loss == "last_turn":  # that of the whole conversation
            conversation, loss = window.mask_turns(keep=window.is_last), "assistant"
        mask = _build_loss_mask(conversation, script, loss)
        if window.first_learnt:
            mask[: min(turn.start for turn in script.turns if turn.message >= window.first_learnt)] = False
        (tokens,) = _encode_scripts([(conversation, script, mask)], self.rules, self.encoder)
        return tokens


def encode_prompt(conversation: Conversation, template: ChatTemplate, encoder: TextEncoder) -> list[int]:
    """Return the tokens of a conversation and the assistant's next header. Special tokens' text in messages stays text.

    Raises DataError with the chat template's fault if it cannot render the conversation.
    """
    script = template.render_prompt(conversation)
    ids: list[int] = []
    for piece in _split_at_markers(script):
        text = script.text[piece.start : piece.stop]
        ids += [encoder.get_special_token_id(text)] if piece.is_marker else encoder.encode(text)
    return ids


def _apply_template(document: Document, template: ChatTemplate) -> tuple[Conversation, RenderedChat]:
    try:
        conversation = Conversation.from_text(document.text)
    except InvalidRecord as error:
        raise DataError(f"{document.name}: {error}. Prepare the data again.") from error
    return conversation, _render_script(document, conversation, template)


def _render_script(document: Document, conversation: Conversation, template: ChatTemplate) -> RenderedChat:
    try:
        return template.render_conversation(conversation)
    except DataError as error:
        raise DataError(
            f"{document.name}: the chat template {error}. Change or remove the conversation, or give a tokenizer "
            "whose template can write it."
        ) from error


def _split_at_markers(script: RenderedChat) -> list[_EncodingSpan]:
    pieces = []
    at = 0
    for start, stop in script.markers:
        pieces += [_EncodingSpan(at, start, is_marker=False), _EncodingSpan(start, stop, is_marker=True)]
        at = stop
    pieces.append(_EncodingSpan(at, len(script.text), is_marker=False))
    return [piece for piece in pieces if piece.start < piece.stop]


def _build_loss_mask(conversation: Conversation, script: RenderedChat, loss: str) -> NDArray[np.bool_]:
    """Return the mask of characters with loss, (characters,) bool."""
    if loss == "all":
        mask = np.ones(len(script.text), dtype=np.bool_)
        masked = [turn for turn in script.turns if conversation.messages[turn.message].loss is False]
        for start, stop in [*script.results, *((turn.start, turn.stop) for turn in masked)]:
            mask[start:stop] = False
        return mask
    mask = np.zeros(len(script.text), dtype=np.bool_)
    for turn in script.turns:
        switch = conversation.messages[turn.message].loss
        wanted = loss == "assistant" or turn.message == script.turns[-1].message
        mask[turn.start : turn.stop] = wanted if switch is None else switch
    return mask


def _encode_span(
    piece: _EncodingSpan,
    script: RenderedChat,
    mask: NDArray[np.bool_],
    encoder: TextEncoder,
    encoded: Iterator[EncodedText],
) -> _RenderedTokens:
    with_loss = mask[piece.start : piece.stop]
    if piece.is_marker:
        return _build_single_token(
            encoder.get_special_token_id(script.text[piece.start : piece.stop]), loss=bool(with_loss.any())
        )
    text = next(encoded)
    # Prefix sums of the mask: a token has loss if they differ between its beginning and its end.
    loss_counts = np.concatenate([[0], np.cumsum(with_loss)])
    return _RenderedTokens(
        text.ids, loss_counts[text.char_spans[:, 1]] > loss_counts[text.char_spans[:, 0]], text.starts_character
    )


def _build_closing_tokens(
    conversation: Conversation, script: RenderedChat, mask: NDArray[np.bool_], rules: ChatRules, encoder: TextEncoder
) -> list[_RenderedTokens]:
    """Return the end that the template omitted after a last answer, with loss if the answer has it."""
    if conversation.messages[-1].role != "assistant" or script.turns[-1].closed:
        return []
    end = (
        rules.end_of_text
        if script.missing_end_of_turn is None
        else encoder.get_special_token_id(script.missing_end_of_turn)
    )
    return [_build_single_token(end, loss=bool(mask[script.turns[-1].stop - 1]))]


def _build_single_token(token: int, *, loss: bool) -> _RenderedTokens:
    return _RenderedTokens(np.array([token], dtype=np.uint32), np.array([loss]), np.array([True]))


def _concatenate_tokens(spans: Sequence[_RenderedTokens]) -> _RenderedTokens:
    return _RenderedTokens(*(np.concatenate(arrays) for arrays in zip(*spans, strict=True)))


def _split_into_examples(number: int, document: Document, tokens: _RenderedTokens, rules: ChatRules) -> list[Example]:
    total = len(tokens.ids)
    if total <= rules.sequence_length:
        return [_build_example(number, tokens, 0, total)]
    if rules.overlong == "drop":
        return []
    if rules.overlong == "error":
        raise DataError(
            f"{document.name}: {total} tokens, longer than data.sequence_length {rules.sequence_length}. Set overlong: "
            "drop, window or split for this source, raise data.sequence_length, or shorten the conversation."
        )
    cuts = [0, *_find_split_points(tokens.starts_character, rules.sequence_length), total]
    return [_build_example(number, tokens, start, stop) for start, stop in pairwise(cuts)]


def _find_split_points(clean: NDArray[np.bool_], length: int) -> list[int]:
    """Return the starts of the chunks after the first: at most `length` tokens each, never inside a character."""
    cuts: list[int] = []
    start = 0
    while len(clean) - start > length:
        cut = start + length
        # A chunk of one token would have no prediction target.
        cut -= cut == len(clean) - 1
        start = next((at for at in range(cut, start, -1) if clean[at]), cut)
        cuts.append(start)
    return cuts


def _build_example(number: int, tokens: _RenderedTokens, start: int, stop: int) -> Example:
    loss = tokens.loss[start:stop].copy()
    loss[0] = False  # nothing precedes the first token to predict it from
    return Example(tokens.ids[start:stop].copy(), loss, number)
