"""Renders documents into examples: plain or fill-in-the-middle, cut where they are longer than a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llm_training_toolkit.data.code.chunking import Chunk, Fragment, Work, chunks, part, shortened, spans
from llm_training_toolkit.data.code.fim import FimRules, rearranged
from llm_training_toolkit.data.code.repo_format import Passage
from llm_training_toolkit.data.code.rules import Rules
from llm_training_toolkit.data.code.split_points import Item, Strip, Text, encode, special
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Encoded, Ids, TextEncoder
from llm_training_toolkit.data.types import Example, Rendered


def render(documents: Sequence[tuple[int, Document]], rules: Rules, encoder: TextEncoder) -> list[Rendered]:
    """Render numbered documents; the result of each depends on nothing but itself and the rules.

    Every token of every document is in exactly one example, none longer than rules.sequence_length.
    Raises DataError, naming the document, where one is too long and the rules say `error`.
    """
    written = [rules.passages(document) for _, document in documents]
    encoded = encode(([item for each in passages for item in _items(each)] for passages in written), encoder)
    works = [
        Work(number, document, passages, Strip([*runs, special(rules.end_of_text)]), spans(passages, runs))
        for (number, document), passages, runs in zip(documents, written, encoded, strict=True)
    ]
    whole = [work for work in works if _is_rearranged_whole(work, rules)]
    done = {work.number: examples for work, examples in zip(whole, _cut_last(whole, rules, encoder), strict=True)}
    cut = [chunk for work in works if work.number not in done for chunk in chunks(work, rules)]
    for chunk, example in sorted(_examples(cut, rules, encoder), key=lambda each: each[0].start):
        done.setdefault(chunk.work.number, []).append(example)
    return [Rendered(work.number, len(work.strip.tokens), done.get(work.number, [])) for work in works]


class _Piece(NamedTuple):
    """Tokens of a file as they are shown; `middle` of them, at the end, are the middle, None where it is plain."""

    tokens: Ids
    middle: int | None = None


def _items(passage: Passage) -> list[Item]:
    head: list[Item] = [item if isinstance(item, int) else Text(item, len(item)) for item in passage.head]
    return [*head, Text(passage.lead + passage.body + passage.tail, len(passage.lead))]


def _is_rearranged_whole(work: Work, rules: Rules) -> bool:
    fits = len(work.strip.tokens) <= rules.sequence_length
    return rules.fim is not None and rules.fim.whole and rules.too_long == "continue" and not fits


def _examples(cut: Iterable[Chunk], rules: Rules, encoder: TextEncoder) -> Iterator[tuple[Chunk, Example]]:
    """One example of every chunk, in any order.

    Text in three pieces takes a few more tokens than whole. A chunk that has got too long by it is cut in two, and
    both are tried anew.
    """
    if rules.fim is None:
        yield from ((chunk, _as_it_is(chunk)) for chunk in cut)
        return
    pending = list(cut)
    while pending:
        too_long = []
        for chunk, pieces in zip(pending, _pieces(pending, rules, rules.fim, encoder), strict=True):
            lacking = sum(_growth(chunk, *each) for each in pieces) - _room(chunk, rules)
            shorter = shortened(chunk, lacking, rules) if lacking > 0 else []
            too_long += shorter
            if not shorter:
                yield chunk, _filled_in(chunk, pieces, rules)
        pending = too_long


def _pieces(cut: list[Chunk], rules: Rules, fim: FimRules, encoder: TextEncoder) -> list[list[tuple[Fragment, _Piece]]]:
    """The files of each chunk that are to be rearranged, each by a chance of its own, as pieces."""
    chosen = [
        [
            (fragment, rearranged(fragment.lead, fragment.body, chance, fim))
            for fragment in chunk.fragments
            if (chance := chunk.work.chance(fragment.part, rules)) is not None
        ]
        for chunk in cut
    ]
    texts = [item.text for each in chosen for _, items in each for item in items if isinstance(item, Text)]
    encoded = iter(encoder.encode_batch(texts))
    return [
        [(fragment, _piece(_head(chunk, fragment), items, encoded)) for fragment, items in each]
        for chunk, each in zip(cut, chosen, strict=True)
    ]


def _head(chunk: Chunk, fragment: Fragment) -> Ids:
    return chunk.tokens[fragment.start : fragment.start + fragment.head]


def _piece(head: Ids, items: list[Item], encoded: Iterator[Encoded]) -> _Piece:
    ids = [np.array([item], dtype=np.uint32) if isinstance(item, int) else next(encoded).ids for item in items]
    return _Piece(np.concatenate([head, *ids]), len(ids[-1]))


def _room(chunk: Chunk, rules: Rules) -> int:
    return rules.sequence_length - len(chunk.tokens) - chunk.is_last


def _growth(chunk: Chunk, fragment: Fragment, piece: _Piece) -> int:
    """Tokens that a chunk gets longer by, with an end where the middle comes last: what was moved there has to end."""
    needs_end = fragment.stop == len(chunk.tokens) and not chunk.is_last
    return len(piece.tokens) - (fragment.stop - fragment.start) + needs_end


def _as_it_is(chunk: Chunk) -> Example:
    tokens = chunk.work.strip.tokens[chunk.start : chunk.stop + chunk.is_last]
    return Example(tokens, np.ones(len(tokens), dtype=np.bool_), chunk.work.number)


def _filled_in(chunk: Chunk, pieces: list[tuple[Fragment, _Piece]], rules: Rules) -> Example:
    """A chunk with its files rearranged, as far as they fit; where they do not, a file stays as it is."""
    if not pieces:
        return _as_it_is(chunk)
    room = _room(chunk, rules)
    shown, place = [], 0
    for fragment, piece in pieces:
        growth = _growth(chunk, fragment, piece)
        if growth <= room:
            room -= growth
            shown += [_Piece(chunk.tokens[place : fragment.start]), piece]
            place = fragment.stop
    shown.append(_Piece(chunk.tokens[place:]))
    shown = [piece for piece in shown if len(piece.tokens)]
    return _shown(shown, chunk.work.number, rules, has_end=chunk.is_last or shown[-1].middle is not None)


def _cut_last(works: list[Work], rules: Rules, encoder: TextEncoder) -> Iterator[list[Example]]:
    """The examples of documents whose files are rearranged whole, and which are cut then."""
    fim = rules.fim
    if fim is None:
        return
    moved = [[_moved(work, number, rules, fim) for number in range(len(work.passages))] for work in works]
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


def _moved(work: Work, number: int, rules: Rules, fim: FimRules) -> list[Item]:
    passage = work.passages[number]
    chance = work.chance(part(number, 0), rules)
    if chance is None:
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
