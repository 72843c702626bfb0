"""Renders conversations into examples: the tokens the model's own template gives, and loss on what the assistant says.

Rules, exactly:

- The tokens are those of transformers' `apply_chat_template`, up to the end of the last turn. What a template writes
  after that (a line break, the beginning of another turn) is left out, and no end of text is added: the end of a turn
  is an end. A template without a marker for it (plain words) gets the family's end of text after a last answer.
- Special tokens are those that the template writes. Their text within a message, a tool or an argument stays text.
- Loss `assistant` lies on what the assistant says, from behind the header of its turn to the marker that ends it,
  included: thinking as far as the template keeps it, the empty thinking that it writes, tool calls, the answer. A
  token that is partly header and partly answer bears loss, because the model has to write it.
- Loss `last_turn` lies on the last message of the assistant alone. A message's own switch goes before both.
- Loss `all` lies on every token but the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.chat.messages import Conversation, InvalidRecord
from llm_training_toolkit.data.chat.template import ChatTemplate, RenderedChat
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import EncodedText, TextEncoder
from llm_training_toolkit.data.types import Example, RenderedDocument
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class ChatRules:
    """All that rendering a conversation depends on besides the conversation, the tokenizer and its template.

    end_of_text: the id that ends a conversation whose template has no marker for the end of a turn.
    """

    sequence_length: int
    end_of_text: int
    loss: Literal["assistant", "last_turn", "all"] = "assistant"
    overlong: Literal["drop", "split", "error"] = "drop"


class _RenderedTokens(NamedTuple):
    """Tokens (L,) uint32; whether each bears loss, and whether a character begins with it (L,) bool."""

    ids: NDArray[np.uint32]
    loss: NDArray[np.bool_]
    starts_character: NDArray[np.bool_]


class _EncodingSpan(NamedTuple):
    """Characters [start, stop) of a script that are encoded as one: a marker, or the text up to the next one."""

    start: int
    stop: int
    is_marker: bool


def render_chat(
    documents: Sequence[tuple[int, Document]], rules: ChatRules, encoder: TextEncoder, template: ChatTemplate
) -> list[RenderedDocument]:
    """Render numbered conversations; the result of each depends on nothing but itself and the rules.

    Raises DataError, naming the document, where its text is no conversation, where the template does not write it, and
    where it is too long and the rules say `error`.
    """
    read = [_apply_template(document, template) for _, document in documents]
    pieces = [_split_at_markers(script) for _, script in read]
    texts = [
        script.text[piece.start : piece.stop]
        for (_, script), cut in zip(read, pieces, strict=True)
        for piece in cut
        if not piece.is_marker
    ]
    encoded = iter(encoder.encode_batch(texts))
    rendered = []
    for (number, document), (conversation, script), cut in zip(documents, read, pieces, strict=True):
        mask = _build_loss_mask(conversation, script, rules.loss)
        parts = [_encode_span(piece, script, mask, encoder, encoded) for piece in cut]
        tokens = _concatenate_tokens(parts + _build_closing_tokens(conversation, script, mask, rules, encoder))
        rendered.append(
            RenderedDocument(number, len(tokens.ids), _split_into_examples(number, document, tokens, rules))
        )
    return rendered


def encode_prompt(conversation: Conversation, template: ChatTemplate, encoder: TextEncoder) -> list[int]:
    """The tokens of a conversation up to where the assistant goes on; special tokens' text within it stays text.

    Raises DataError, what the chat template does wrong, where it cannot write the conversation.
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
    try:
        return conversation, template.render_conversation(conversation)
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
    """Which characters of the script bear loss (characters,)."""
    if loss == "all":
        return np.ones(len(script.text), dtype=np.bool_)
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
    # Characters with loss before each place: a token bears loss when there are more at its end than at its beginning.
    before = np.concatenate([[0], np.cumsum(with_loss)])
    return _RenderedTokens(
        text.ids, before[text.char_spans[:, 1]] > before[text.char_spans[:, 0]], text.starts_character
    )


def _build_closing_tokens(
    conversation: Conversation, script: RenderedChat, mask: NDArray[np.bool_], rules: ChatRules, encoder: TextEncoder
) -> list[_RenderedTokens]:
    """The end that a last answer needs and the template did not write; with loss if the answer has."""
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


def _concatenate_tokens(parts: Sequence[_RenderedTokens]) -> _RenderedTokens:
    return _RenderedTokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _split_into_examples(number: int, document: Document, tokens: _RenderedTokens, rules: ChatRules) -> list[Example]:
    total = len(tokens.ids)
    if total <= rules.sequence_length:
        return [_build_example(number, tokens, 0, total)]
    if rules.overlong == "drop":
        return []
    if rules.overlong == "error":
        raise DataError(
            f"{document.name}: {total} tokens, longer than data.sequence_length {rules.sequence_length}. Set overlong: "
            "drop or split for this source, raise data.sequence_length, or shorten the conversation."
        )
    cuts = [0, *_find_split_points(tokens.starts_character, rules.sequence_length), total]
    return [_build_example(number, tokens, start, stop) for start, stop in pairwise(cuts)]


def _find_split_points(clean: NDArray[np.bool_], length: int) -> list[int]:
    """Where chunks begin, the first left out: after at most `length` tokens, never inside a character."""
    cuts: list[int] = []
    start = 0
    while len(clean) - start > length:
        cut = start + length
        # A last token alone would be an example without anything to predict.
        cut -= cut == len(clean) - 1
        start = next((at for at in range(cut, start, -1) if clean[at]), cut)
        cuts.append(start)
    return cuts


def _build_example(number: int, tokens: _RenderedTokens, start: int, stop: int) -> Example:
    loss = tokens.loss[start:stop].copy()
    loss[0] = False  # nothing comes before it that could predict it
    return Example(tokens.ids[start:stop].copy(), loss, number)
