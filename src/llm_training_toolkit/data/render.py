"""Renders documents into examples: plain or fill-in-the-middle, cut where they are longer than a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.config.schema import Source
from llm_training_toolkit.data.encoded import Encoded
from llm_training_toolkit.data.fragments import Fragment, fragments, spans
from llm_training_toolkit.data.layout import Layout, Passage, plain
from llm_training_toolkit.data.markers import Markers
from llm_training_toolkit.data.middle import FimRules, draw, rearranged
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.strip import Item, Run, Strip, Text, encode, special
from llm_training_toolkit.data.tokenizer import TextEncoder
from llm_training_toolkit.errors import DataError

Tokens = NDArray[np.uint32]


@dataclass(frozen=True)
class Example:
    """What the model is shown of one document: tokens (L,) uint32, loss (L,) bool, and the document's number.

    `loss[i]` says whether token i is to be predicted; the first token of an example never can be.
    """

    tokens: Tokens
    loss: NDArray[np.bool_]
    document: int


class Rendered(NamedTuple):
    """A document's examples (none: dropped as too long) and the tokens of the whole document with its end."""

    document: int
    tokens: int
    examples: list[Example]


@dataclass(frozen=True)
class Rules:
    """All that rendering depends on besides the document and its number."""

    sequence_length: int
    end_of_text: int
    too_long: Literal["continue", "drop", "error"] = "continue"
    fim: FimRules | None = None
    seed: int = 0
    epoch: int = 0
    layout: Layout | None = None

    @classmethod
    def of(
        cls, source: Source, markers: Markers, encoder: TextEncoder, sequence_length: int, *, seed: int, epoch: int
    ) -> Rules:
        """The rules of a source of the configuration. Raises DataError where the tokenizer lacks a marker."""
        return cls(
            sequence_length,
            encoder.id_of(markers.tokens.end_of_text),
            "continue" if source.too_long == "auto" else source.too_long,
            None if source.fim is None else FimRules.of(source.fim, markers, encoder),
            seed,
            epoch,
            Layout.of(source, markers, encoder),
        )

    def passages(self, document: Document) -> list[Passage]:
        """The files of a document as they are written."""
        return plain(document) if self.layout is None else self.layout.passages(document)

    def longest(self, files: Sequence[int]) -> Callable[[int], int]:
        """How many tokens a chunk may have that begins at a token; `files` are the tokens where files begin.

        What rearranging adds must still fit: some tokens for every file that may be in the chunk.
        """
        room = min(16, self.sequence_length // 4) if self.fim else 0

        def length(start: int) -> int:
            inside = sum(start < file < start + self.sequence_length for file in files) if room else 0
            return max(self.sequence_length - room * (1 + inside), self.sequence_length // 2)

        return length


def render(documents: Sequence[tuple[int, Document]], rules: Rules, encoder: TextEncoder) -> list[Rendered]:
    """Render numbered documents; the result of each depends on nothing but itself and the rules.

    Every token of every document is in exactly one example, none longer than rules.sequence_length.
    Raises DataError, naming the document, where one is too long and the rules say `error`.
    """
    written = [rules.passages(document) for _, document in documents]
    encoded = encode(([item for each in passages for item in _items(each)] for passages in written), encoder)
    works = [
        _Work(number, document, passages, runs, Strip([*runs, special(rules.end_of_text)]))
        for (number, document), passages, runs in zip(documents, written, encoded, strict=True)
    ]
    chunks = [_chunks(work, rules) for work in works]
    examples = iter(_examples([chunk for each in chunks for chunk in each], rules, encoder))
    in_one = iter(_cut_last([work for work in works if _is_rearranged_whole(work, rules)], rules, encoder))
    return [
        Rendered(
            work.number,
            len(work.strip.tokens),
            next(in_one) if _is_rearranged_whole(work, rules) else [next(examples) for _ in each],
        )
        for work, each in zip(works, chunks, strict=True)
    ]


class _Work(NamedTuple):
    """A document on its way: its files, and its plain tokens with the end."""

    number: int
    document: Document
    passages: list[Passage]
    runs: list[Run]
    strip: Strip


class _Chunk(NamedTuple):
    """A part of a document: its plain tokens without the end, whether the end comes after it, and its fragments."""

    tokens: Tokens
    is_last: bool
    source: int
    document: int
    fragments: list[Fragment]


class _Piece(NamedTuple):
    """Tokens of a file as they are shown; `middle` of them, at the end, are the middle, None where it is plain."""

    tokens: Tokens
    middle: int | None = None


def _items(passage: Passage) -> list[Item]:
    head: list[Item] = [item if isinstance(item, int) else Text(item, len(item)) for item in passage.head]
    return [*head, Text(passage.lead + passage.body + passage.tail, len(passage.lead))]


def _is_rearranged_whole(work: _Work, rules: Rules) -> bool:
    fits = len(work.strip.tokens) <= rules.sequence_length
    return rules.fim is not None and rules.fim.whole and rules.too_long == "continue" and not fits


def _chunks(work: _Work, rules: Rules) -> list[_Chunk]:
    """The chunks of a document, one where it fits; none where it is dropped, or rearranged before it is cut."""
    tokens = work.strip.tokens
    if len(tokens) > rules.sequence_length and rules.too_long == "error":
        raise DataError(
            f"{work.document.name}: {len(tokens)} tokens, longer than data.sequence_length {rules.sequence_length}. "
            "Set too_long: continue or drop for this source, raise data.sequence_length, or shorten the document."
        )
    if _is_rearranged_whole(work, rules) or (len(tokens) > rules.sequence_length and rules.too_long == "drop"):
        return []
    files = spans(work.passages, work.runs)
    cuts = []
    if len(tokens) > rules.sequence_length:
        cuts = work.strip.cuts(rules.longest([file.first for file in files]))
    bounds = list(pairwise([0, *cuts, len(tokens) - 1]))
    parts = fragments(work.passages, files, work.strip, bounds) if rules.fim else [[] for _ in bounds]
    return [
        _Chunk(tokens[start:stop], stop == len(tokens) - 1, work.document.source, work.number, inside)
        for (start, stop), inside in zip(bounds, parts, strict=True)
    ]


def _examples(chunks: list[_Chunk], rules: Rules, encoder: TextEncoder) -> Iterator[Example]:
    """One example of every chunk; each of its files has a chance of its own to be rearranged."""
    fim = rules.fim
    if fim is None:
        for chunk in chunks:
            yield _shown([_Piece(chunk.tokens)], chunk.document, rules, has_end=chunk.is_last)
        return
    wanted: dict[tuple[int, int], list[Item]] = {}
    for index, chunk in enumerate(chunks):
        for fragment in chunk.fragments:
            chance = draw(rules.seed, rules.epoch, chunk.source, chunk.document, fragment.number)
            if chance.rearrange < fim.rate:
                wanted[index, fragment.number] = rearranged(fragment.lead, fragment.body, chance, fim)
    texts = [item.text for items in wanted.values() for item in items if isinstance(item, Text)]
    encoded = iter(encoder.encode_batch(texts))
    pieces = {place: _piece(items, encoded) for place, items in wanted.items()}
    for index, chunk in enumerate(chunks):
        yield _filled_in(chunk, {f.number: pieces.get((index, f.number)) for f in chunk.fragments}, rules)


def _piece(items: list[Item], encoded: Iterator[Encoded]) -> _Piece:
    ids = [np.array([item], dtype=np.uint32) if isinstance(item, int) else next(encoded).ids for item in items]
    return _Piece(np.concatenate(ids), len(ids[-1]))


def _filled_in(chunk: _Chunk, pieces: dict[int, _Piece | None], rules: Rules) -> Example:
    """A chunk with the files rearranged that are to be, as far as they still fit.

    Text cut in three takes a few more tokens than whole; where they do not fit, a file stays as it is.
    """
    room = rules.sequence_length - len(chunk.tokens) - chunk.is_last
    shown, place = [], 0
    for fragment in chunk.fragments:
        shown.append(_Piece(chunk.tokens[place : fragment.start]))
        place = fragment.stop
        whole = chunk.tokens[fragment.start : fragment.stop]
        piece = pieces[fragment.number]
        if piece is not None:
            piece = _Piece(np.concatenate([whole[: fragment.head], piece.tokens]), piece.middle)
            needs_end = place == len(chunk.tokens) and not chunk.is_last
            grown = len(piece.tokens) - len(whole) + needs_end
            if grown <= room:
                room -= grown
                shown.append(piece)
                continue
        shown.append(_Piece(whole))
    shown.append(_Piece(chunk.tokens[place:]))
    shown = [piece for piece in shown if len(piece.tokens)]
    # What was moved to the end of an example has to end there.
    return _shown(shown, chunk.document, rules, has_end=chunk.is_last or shown[-1].middle is not None)


def _cut_last(works: list[_Work], rules: Rules, encoder: TextEncoder) -> Iterator[list[Example]]:
    """The examples of documents whose files are rearranged whole, and which are cut then."""
    fim = rules.fim
    if fim is None:
        return
    moved = [
        [_moved(passage, work, number, rules, fim) for number, passage in enumerate(work.passages)] for work in works
    ]
    encoded = iter(encode((items for files in moved for items in files), encoder))
    for work, files in zip(works, moved, strict=True):
        runs = [next(encoded) for _ in files]
        pieces = [
            _Piece(np.concatenate([run.ids for run in file]), len(file[-1].ids) if fim.middle in items else None)
            for file, items in zip(runs, files, strict=True)
        ]
        whole = _shown(pieces, work.number, rules, has_end=True)
        strip = Strip([*(run for file in runs for run in file), special(rules.end_of_text)])
        bounds = pairwise([0, *strip.cuts(lambda _: rules.sequence_length), len(strip.tokens)])
        yield [Example(whole.tokens[start:stop], whole.loss[start:stop], work.number) for start, stop in bounds]


def _moved(passage: Passage, work: _Work, number: int, rules: Rules, fim: FimRules) -> list[Item]:
    chance = draw(rules.seed, rules.epoch, work.document.source, work.number, number)
    if chance.rearrange >= fim.rate:
        return _items(passage)
    return [*_items(passage)[:-1], *rearranged(passage.lead, passage.body, chance, fim)]


def _shown(pieces: list[_Piece], document: int, rules: Rules, *, has_end: bool) -> Example:
    """Pieces as one example. With loss on the middle alone, what a rearranged file has else bears none."""
    end = np.full(int(has_end), rules.end_of_text, dtype=np.uint32)
    tokens = np.concatenate([*(piece.tokens for piece in pieces), end])
    loss = np.ones(len(tokens), dtype=np.bool_)
    if rules.fim is not None and rules.fim.middle_only:
        place, after_middle = 0, False
        for piece in pieces:
            if piece.middle is not None:
                loss[place : place + len(piece.tokens) - piece.middle] = False
                loss[place] = after_middle  # what ends a middle is the next file's marker, if there is one
            place, after_middle = place + len(piece.tokens), piece.middle is not None
    return Example(tokens, loss, document)
