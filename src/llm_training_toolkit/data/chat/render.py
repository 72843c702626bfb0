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

from llm_training_toolkit.data.chat.messages import Conversation, UnusableRecord
from llm_training_toolkit.data.chat.template import ChatTemplate, Script
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Encoded, TextEncoder
from llm_training_toolkit.data.types import Example, Rendered
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class ChatRules:
    """All that rendering a conversation depends on besides the conversation, the tokenizer and its template.

    end_of_text: the id that ends a conversation whose template has no marker for the end of a turn.
    """

    sequence_length: int
    end_of_text: int
    loss: Literal["assistant", "last_turn", "all"] = "assistant"
    too_long: Literal["drop", "continue", "error"] = "drop"


class _Tokens(NamedTuple):
    """Tokens (L,) uint32; whether each bears loss, and whether a character begins with it (L,) bool."""

    ids: NDArray[np.uint32]
    loss: NDArray[np.bool_]
    clean: NDArray[np.bool_]


class _Piece(NamedTuple):
    """Characters [start, stop) of a script that are encoded as one: a marker, or the text up to the next one."""

    start: int
    stop: int
    is_marker: bool


def render_chat(
    documents: Sequence[tuple[int, Document]], rules: ChatRules, encoder: TextEncoder, template: ChatTemplate
) -> list[Rendered]:
    """Render numbered conversations; the result of each depends on nothing but itself and the rules.

    Raises DataError, naming the document, where its text is no conversation, where the template does not write it, and
    where it is too long and the rules say `error`.
    """
    read = [_read(document, template) for _, document in documents]
    pieces = [_pieces(script) for _, script in read]
    texts = [
        script.text[piece.start : piece.stop]
        for (_, script), cut in zip(read, pieces, strict=True)
        for piece in cut
        if not piece.is_marker
    ]
    encoded = iter(encoder.encode_batch(texts))
    rendered = []
    for (number, document), (conversation, script), cut in zip(documents, read, pieces, strict=True):
        mask = _mask(conversation, script, rules.loss)
        parts = [_encode(piece, script, mask, encoder, encoded) for piece in cut]
        tokens = _joined(parts + _closing(conversation, script, mask, rules, encoder))
        rendered.append(Rendered(number, len(tokens.ids), _examples(number, document, tokens, rules)))
    return rendered


def prompt_tokens(conversation: Conversation, template: ChatTemplate, encoder: TextEncoder) -> list[int]:
    """The tokens of a conversation up to where the assistant goes on; special tokens' text within it stays text.

    Raises DataError, what the chat template does wrong, where it cannot write the conversation.
    """
    script = template.prompt(conversation)
    ids: list[int] = []
    for piece in _pieces(script):
        text = script.text[piece.start : piece.stop]
        ids += [encoder.id_of(text)] if piece.is_marker else encoder.encode(text)
    return ids


def _read(document: Document, template: ChatTemplate) -> tuple[Conversation, Script]:
    try:
        conversation = Conversation.from_text(document.text)
    except UnusableRecord as error:
        raise DataError(f"{document.name}: {error}. Prepare the data again.") from error
    try:
        return conversation, template.write(conversation)
    except DataError as error:
        raise DataError(
            f"{document.name}: the chat template {error}. Change or remove the conversation, or give a tokenizer "
            "whose template can write it."
        ) from error


def _pieces(script: Script) -> list[_Piece]:
    pieces = []
    at = 0
    for start, stop in script.markers:
        pieces += [_Piece(at, start, is_marker=False), _Piece(start, stop, is_marker=True)]
        at = stop
    pieces.append(_Piece(at, len(script.text), is_marker=False))
    return [piece for piece in pieces if piece.start < piece.stop]


def _mask(conversation: Conversation, script: Script, loss: str) -> NDArray[np.bool_]:
    """Which characters of the script bear loss (characters,)."""
    if loss == "all":
        return np.ones(len(script.text), dtype=np.bool_)
    mask = np.zeros(len(script.text), dtype=np.bool_)
    for turn in script.turns:
        switch = conversation.messages[turn.message].loss
        wanted = loss == "assistant" or turn.message == script.turns[-1].message
        mask[turn.start : turn.stop] = wanted if switch is None else switch
    return mask


def _encode(
    piece: _Piece, script: Script, mask: NDArray[np.bool_], encoder: TextEncoder, encoded: Iterator[Encoded]
) -> _Tokens:
    with_loss = mask[piece.start : piece.stop]
    if piece.is_marker:
        return _one(encoder.id_of(script.text[piece.start : piece.stop]), loss=bool(with_loss.any()))
    text = next(encoded)
    # Characters with loss before each place: a token bears loss when there are more at its end than at its beginning.
    before = np.concatenate([[0], np.cumsum(with_loss)])
    return _Tokens(text.ids, before[text.spans[:, 1]] > before[text.spans[:, 0]], text.clean)


def _closing(
    conversation: Conversation, script: Script, mask: NDArray[np.bool_], rules: ChatRules, encoder: TextEncoder
) -> list[_Tokens]:
    """The end that a last answer needs and the template did not write; with loss if the answer has."""
    if conversation.messages[-1].role != "assistant" or script.turns[-1].closed:
        return []
    end = rules.end_of_text if script.closing is None else encoder.id_of(script.closing)
    return [_one(end, loss=bool(mask[script.turns[-1].stop - 1]))]


def _one(token: int, *, loss: bool) -> _Tokens:
    return _Tokens(np.array([token], dtype=np.uint32), np.array([loss]), np.array([True]))


def _joined(parts: Sequence[_Tokens]) -> _Tokens:
    return _Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _examples(number: int, document: Document, tokens: _Tokens, rules: ChatRules) -> list[Example]:
    total = len(tokens.ids)
    if total <= rules.sequence_length:
        return [_example(number, tokens, 0, total)]
    if rules.too_long == "drop":
        return []
    if rules.too_long == "error":
        raise DataError(
            f"{document.name}: {total} tokens, longer than data.sequence_length {rules.sequence_length}. Set too_long: "
            "drop or continue for this source, raise data.sequence_length, or shorten the conversation."
        )
    cuts = [0, *_cuts(tokens.clean, rules.sequence_length), total]
    return [_example(number, tokens, start, stop) for start, stop in pairwise(cuts)]


def _cuts(clean: NDArray[np.bool_], length: int) -> list[int]:
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


def _example(number: int, tokens: _Tokens, start: int, stop: int) -> Example:
    loss = tokens.loss[start:stop].copy()
    loss[0] = False  # nothing comes before it that could predict it
    return Example(tokens.ids[start:stop].copy(), loss, number)
