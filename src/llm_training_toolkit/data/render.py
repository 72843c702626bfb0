"""Renders documents into examples: plain or fill-in-the-middle, cut where they are longer than a sequence."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.config.schema import FillInTheMiddle, Source
from llm_training_toolkit.data.markers import Markers
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Encoded, TextEncoder
from llm_training_toolkit.errors import DataError


@dataclass(frozen=True)
class Example:
    """What the model is shown of one document: tokens (L,) uint32, loss (L,) bool, and the document's number.

    `loss[i]` says whether token i is to be predicted; the first token of an example never can be.
    """

    tokens: NDArray[np.uint32]
    loss: NDArray[np.bool_]
    document: int


class Rendered(NamedTuple):
    """A document's examples (none: dropped as too long) and the tokens of the whole document with its end."""

    document: int
    tokens: int
    examples: list[Example]


@dataclass(frozen=True)
class FimRules:
    """How a source is rearranged, with the ids of the three sentinels."""

    prefix: int
    middle: int
    suffix: int
    rate: float
    spm_rate: float
    middle_only: bool


@dataclass(frozen=True)
class Rules:
    """All that rendering depends on besides the document and its number."""

    sequence_length: int
    end_of_text: int
    too_long: Literal["continue", "drop", "error"] = "continue"
    fim: FimRules | None = None
    seed: int = 0
    epoch: int = 0

    @classmethod
    def of(
        cls, source: Source, markers: Markers, encoder: TextEncoder, sequence_length: int, *, seed: int, epoch: int
    ) -> Rules:
        """The rules of a source of the configuration. Raises DataError where the tokenizer lacks a marker."""
        fim = None if source.fim is None else _fim_rules(source.fim, markers, encoder)
        return cls(sequence_length, encoder.id_of(markers.end_of_text), source.too_long, fim, seed, epoch)

    @property
    def chunk_length(self) -> int:
        """Tokens of a chunk of a document that is too long: what rearranging adds must still fit."""
        room = min(16, self.sequence_length // 4) if self.fim else 0
        return self.sequence_length - room


def _fim_rules(fim: FillInTheMiddle, markers: Markers, encoder: TextEncoder) -> FimRules:
    sentinels = (markers.fim_prefix, markers.fim_middle, markers.fim_suffix)
    ids = [encoder.id_of(sentinel) for sentinel in sentinels if sentinel is not None]
    if len(ids) != len(sentinels):
        raise DataError(
            "data.sources.fim: this model family has no fill-in-the-middle markers. Remove fim from the source, or "
            "choose a model of a family that has them."
        )
    return FimRules(ids[0], ids[1], ids[2], fim.rate, fim.spm_rate, fim.loss == "middle")


class Draw(NamedTuple):
    """Four independent uniform numbers in [0, 1): rearrange?, in which order?, first cut, second cut."""

    rearrange: float
    order: float
    first: float
    second: float


def draw(seed: int, epoch: int, source: int, document: int, chunk: int) -> Draw:
    """The random numbers of a chunk: a hash of its coordinates, so no order of work can change them."""
    key = f"{seed}/{epoch}/{source}/{document}/{chunk}".encode()
    raw = np.frombuffer(hashlib.blake2b(key, digest_size=32, person=b"ltt-fim").digest(), dtype="<u8")
    return Draw(*((raw >> np.uint64(11)) * 2.0**-53).tolist())


def render(documents: Sequence[tuple[int, Document]], rules: Rules, encoder: TextEncoder) -> list[Rendered]:
    """Render numbered documents; the result of each depends on nothing but itself and the rules.

    Every token of every document is in exactly one example, none longer than rules.sequence_length.
    Raises DataError, naming the document, where one is too long and the rules say `error`.
    """
    encoded = encoder.encode_batch_with_offsets([document.text for _, document in documents])
    whole = [
        _chunks(number, document, text, rules) for (number, document), text in zip(documents, encoded, strict=True)
    ]
    chunks = [chunk for pieces in whole for chunk in pieces]
    examples = iter(_examples(chunks, rules, encoder))
    return [
        Rendered(number, len(text.ids) + 1, [next(examples) for _ in pieces])
        for (number, _), text, pieces in zip(documents, encoded, whole, strict=True)
    ]


class _Chunk(NamedTuple):
    """A part of a document: its plain tokens, its text, and where in the data it stands."""

    tokens: list[int]
    text: str
    source: int
    document: int
    number: int


def _chunks(number: int, document: Document, encoded: Encoded, rules: Rules) -> list[_Chunk]:
    tokens = [*encoded.ids, rules.end_of_text]
    if len(tokens) <= rules.sequence_length:
        return [_Chunk(tokens, document.text, document.source, number, 0)]
    if rules.too_long == "drop":
        return []
    if rules.too_long == "error":
        raise DataError(
            f"{document.name}: {len(tokens)} tokens, longer than data.sequence_length {rules.sequence_length}. Set "
            "too_long: continue or drop for this source, raise data.sequence_length, or shorten the document."
        )
    cuts = [0, *_cuts(encoded, len(tokens), rules.chunk_length)]
    # A chunk's text reaches to the next chunk's first character, so that no character falls between two.
    characters = [0, *(encoded.characters(cut)[0] for cut in cuts[1:]), len(document.text)]
    cuts.append(len(tokens))
    return [
        _Chunk(
            tokens[cuts[i] : cuts[i + 1]],
            document.text[characters[i] : characters[i + 1]],
            document.source,
            number,
            i,
        )
        for i in range(len(cuts) - 1)
    ]


def _cuts(encoded: Encoded, total: int, length: int) -> list[int]:
    """Where chunks begin, the first left out: after at most `length` tokens, never inside a character."""
    cuts: list[int] = []
    start = 0
    while total - start > length:
        cut = start + length
        # An end marker alone would be an example without anything to predict.
        cut -= cut == total - 1
        clean = next((at for at in range(cut, start, -1) if encoded.is_clean(at)), cut)
        cuts.append(clean)
        start = clean
    return cuts


class _Parts(NamedTuple):
    """A chunk to be rearranged: its number in the batch, the order, and its three texts."""

    chunk: int
    suffix_first: bool
    texts: tuple[str, str, str]


def _examples(chunks: list[_Chunk], rules: Rules, encoder: TextEncoder) -> list[Example]:
    examples = [_plain(chunk) for chunk in chunks]
    if rules.fim is None:
        return examples
    wanted = [parts for i, chunk in enumerate(chunks) if (parts := _split(i, chunk, rules, rules.fim))]
    encoded = iter(encoder.encode_batch([text for parts in wanted for text in parts.texts]))
    for parts in wanted:
        prefix, middle, suffix = next(encoded), next(encoded), next(encoded)
        tokens = _rearranged(prefix, middle, suffix, rules.fim, suffix_first=parts.suffix_first)
        tokens.append(rules.end_of_text)
        # Text cut in three takes a few more tokens than whole; where they do not fit, the chunk stays as it is.
        if len(tokens) <= rules.sequence_length:
            examples[parts.chunk] = _with_loss(tokens, len(middle), chunks[parts.chunk].document, rules.fim)
    return examples


def _split(index: int, chunk: _Chunk, rules: Rules, fim: FimRules) -> _Parts | None:
    chance = draw(rules.seed, rules.epoch, chunk.source, chunk.document, chunk.number)
    if chance.rearrange >= fim.rate:
        return None
    places = len(chunk.text) + 1  # before the first character … after the last
    first, second = sorted((int(chance.first * places), int(chance.second * places)))
    texts = (chunk.text[:first], chunk.text[first:second], chunk.text[second:])
    return _Parts(index, chance.order < fim.spm_rate, texts)


def _rearranged(
    prefix: list[int], middle: list[int], suffix: list[int], fim: FimRules, *, suffix_first: bool
) -> list[int]:
    if suffix_first:  # "variant 2": the prefix flows into the middle without a sentinel between them
        return [fim.prefix, fim.suffix, *suffix, fim.middle, *prefix, *middle]
    return [fim.prefix, *prefix, fim.suffix, *suffix, fim.middle, *middle]


def _plain(chunk: _Chunk) -> Example:
    tokens = np.array(chunk.tokens, dtype=np.uint32)
    return Example(tokens, np.ones(len(tokens), dtype=np.bool_), chunk.document)


def _with_loss(tokens: list[int], middle: int, document: int, fim: FimRules) -> Example:
    loss = np.ones(len(tokens), dtype=np.bool_)
    if fim.middle_only:
        loss[: len(tokens) - middle - 1] = False
    return Example(np.array(tokens, dtype=np.uint32), loss, document)
