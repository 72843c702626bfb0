"""Rendering of documents into examples: plain or fill-in-the-middle (FIM), split if longer than a sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from llm_training_toolkit.data.code.chunking import (
    Chunk,
    ChunkSpan,
    TokenizedDocument,
    build_part_key,
    find_file_spans,
    split_chunk_to_fit,
    split_into_chunks,
)
from llm_training_toolkit.data.code.fim import FimRules, apply_fim
from llm_training_toolkit.data.code.repo_format import FileSegment
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.code.split_points import (
    Segment,
    TextSegment,
    TokenBuffer,
    build_special_run,
    encode_segments,
)
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import EncodedText, Ids, TextEncoder
from llm_training_toolkit.data.types import Example, RenderedDocument


def render_code(
    documents: Sequence[tuple[int, Document]], rules: RenderRules, encoder: TextEncoder
) -> list[RenderedDocument]:
    """Render numbered documents; each result depends only on its document and the rules.

    Every token of a document is in exactly one example of at most rules.sequence_length tokens.
    Raises DataError, naming the document, if one is too long and `rules.overlong` is `error`.
    """
    written = [rules.build_file_segments(document) for _, document in documents]
    encoded = encode_segments(
        ([item for each in passages for item in _build_segments(each)] for passages in written), encoder
    )
    works = [
        TokenizedDocument(
            number,
            document,
            passages,
            TokenBuffer([*runs, build_special_run(rules.end_of_text)]),
            find_file_spans(passages, runs),
        )
        for (number, document), passages, runs in zip(documents, written, encoded, strict=True)
    ]
    whole = [work for work in works if _is_document_level_fim(work, rules)]
    done = {
        work.number: examples
        for work, examples in zip(whole, _render_document_level_fim(whole, rules, encoder), strict=True)
    }
    cut = [chunk for work in works if work.number not in done for chunk in split_into_chunks(work, rules)]
    for chunk, example in sorted(_render_chunks(cut, rules, encoder), key=lambda each: each[0].start):
        done.setdefault(chunk.tokenized.number, []).append(example)
    return [
        RenderedDocument(
            work.number,
            len(work.buffer.tokens),
            done.get(work.number, []),
            None if work.number in done else "too_long",
        )
        for work in works
    ]


class _RenderedSpan(NamedTuple):
    """Tokens of a file as rendered; the last `middle_length` of them are the FIM middle (None: plain)."""

    tokens: Ids
    middle_length: int | None = None


def _build_segments(passage: FileSegment) -> list[Segment]:
    head: list[Segment] = [item if isinstance(item, int) else TextSegment(item, len(item)) for item in passage.head]
    return [*head, TextSegment(passage.lead + passage.body + passage.tail, len(passage.lead))]


def _is_document_level_fim(work: TokenizedDocument, rules: RenderRules) -> bool:
    fits = len(work.buffer.tokens) <= rules.sequence_length
    return rules.fim is not None and rules.fim.whole and rules.overlong == "split" and not fits


def _render_chunks(cut: Iterable[Chunk], rules: RenderRules, encoder: TextEncoder) -> Iterator[tuple[Chunk, Example]]:
    """Yield one example per chunk, in any order.

    Text encoded in three pieces takes a few more tokens than as a whole. A chunk that becomes too long is split in two,
    and both are retried.
    """
    if rules.fim is None:
        yield from ((chunk, _render_plain_chunk(chunk)) for chunk in cut)
        return
    pending = list(cut)
    while pending:
        too_long = []
        for chunk, pieces in zip(pending, _apply_fim_to_chunks(pending, rules, rules.fim, encoder), strict=True):
            lacking = sum(_compute_added_tokens(chunk, *each) for each in pieces) - _compute_free_tokens(chunk, rules)
            shorter = split_chunk_to_fit(chunk, lacking, rules) if lacking > 0 else []
            too_long += shorter
            if not shorter:
                yield chunk, _render_fim_chunk(chunk, pieces, rules)
        pending = too_long


def _apply_fim_to_chunks(
    cut: list[Chunk], rules: RenderRules, fim: FimRules, encoder: TextEncoder
) -> list[list[tuple[ChunkSpan, _RenderedSpan]]]:
    """Return the rearranged file spans of each chunk; every file is drawn independently."""
    chosen = [
        [
            (fragment, apply_fim(fragment.lead, fragment.body, chance, fim))
            for fragment in chunk.spans
            if (chance := chunk.tokenized.draw_fim_for_part(fragment.part, rules)) is not None
        ]
        for chunk in cut
    ]
    texts = [item.text for each in chosen for _, items in each for item in items if isinstance(item, TextSegment)]
    encoded = iter(encoder.encode_batch(texts))
    return [
        [(fragment, _build_fim_span(_get_head_tokens(chunk, fragment), items, encoded)) for fragment, items in each]
        for chunk, each in zip(cut, chosen, strict=True)
    ]


def _get_head_tokens(chunk: Chunk, fragment: ChunkSpan) -> Ids:
    return chunk.tokens[fragment.start : fragment.start + fragment.head]


def _build_fim_span(head: Ids, items: list[Segment], encoded: Iterator[EncodedText]) -> _RenderedSpan:
    ids = [np.array([item], dtype=np.uint32) if isinstance(item, int) else next(encoded).ids for item in items]
    return _RenderedSpan(np.concatenate([head, *ids]), len(ids[-1]))


def _compute_free_tokens(chunk: Chunk, rules: RenderRules) -> int:
    return rules.sequence_length - len(chunk.tokens) - chunk.is_last


def _compute_added_tokens(chunk: Chunk, fragment: ChunkSpan, piece: _RenderedSpan) -> int:
    """Count the tokens that FIM adds, including an end of text if the moved middle ends the chunk."""
    needs_end = fragment.stop == len(chunk.tokens) and not chunk.is_last
    return len(piece.tokens) - (fragment.stop - fragment.start) + needs_end


def _render_plain_chunk(chunk: Chunk) -> Example:
    tokens = chunk.tokenized.buffer.tokens[chunk.start : chunk.stop + chunk.is_last]
    loss = np.ones(len(tokens), dtype=np.bool_)
    if chunk.tokenized.document.segments:
        for segment, file in zip(chunk.tokenized.file_segments, chunk.tokenized.files, strict=True):
            if not segment.is_trained:
                loss[max(file.head_start - chunk.start, 0) : max(file.end - chunk.start, 0)] = False
    return Example(tokens, loss, chunk.tokenized.number)


def _render_fim_chunk(chunk: Chunk, pieces: list[tuple[ChunkSpan, _RenderedSpan]], rules: RenderRules) -> Example:
    """Render a chunk with as many rearranged files as fit; the other files stay plain."""
    if not pieces:
        return _render_plain_chunk(chunk)
    room = _compute_free_tokens(chunk, rules)
    shown, offset = [], 0
    for fragment, piece in pieces:
        growth = _compute_added_tokens(chunk, fragment, piece)
        if growth <= room:
            room -= growth
            shown += [_RenderedSpan(chunk.tokens[offset : fragment.start]), piece]
            offset = fragment.stop
    shown.append(_RenderedSpan(chunk.tokens[offset:]))
    shown = [piece for piece in shown if len(piece.tokens)]
    return _build_example(
        shown, chunk.tokenized.number, rules, has_end=chunk.is_last or shown[-1].middle_length is not None
    )


def _render_document_level_fim(
    works: list[TokenizedDocument], rules: RenderRules, encoder: TextEncoder
) -> Iterator[list[Example]]:
    """Rearrange the files of each document as a whole, then split; yield the examples per document."""
    fim = rules.fim
    if fim is None:
        return
    moved = [
        [_build_fim_segments(work, number, rules, fim) for number in range(len(work.file_segments))] for work in works
    ]
    encoded = iter(encode_segments((items for files in moved for items in files), encoder))
    for work, files in zip(works, moved, strict=True):
        runs = [next(encoded) for _ in files]
        pieces = [
            _RenderedSpan(np.concatenate([run.ids for run in file]), len(file[-1].ids) if fim.middle in items else None)
            for file, items in zip(runs, files, strict=True)
        ]
        whole = _build_example(pieces, work.number, rules, has_end=True)
        strip = TokenBuffer([*(run for file in runs for run in file), build_special_run(rules.end_of_text)])
        bounds = pairwise([0, *strip.find_split_points(lambda _: rules.sequence_length), len(strip.tokens)])
        yield [Example(whole.tokens[start:stop], whole.loss[start:stop], work.number) for start, stop in bounds]


def _build_fim_segments(work: TokenizedDocument, number: int, rules: RenderRules, fim: FimRules) -> list[Segment]:
    passage = work.file_segments[number]
    chance = work.draw_fim_for_part(build_part_key(number, 0), rules)
    if chance is None:
        return _build_segments(passage)
    return [*_build_segments(passage)[:-1], *apply_fim(passage.lead, passage.body, chance, fim)]


def _build_example(pieces: list[_RenderedSpan], document: int, rules: RenderRules, *, has_end: bool) -> Example:
    """Concatenate spans into one example; with `middle_only`, a rearranged file bears loss on its middle alone."""
    end = np.full(int(has_end), rules.end_of_text, dtype=np.uint32)
    tokens = np.concatenate([*(piece.tokens for piece in pieces), end])
    loss = np.ones(len(tokens), dtype=np.bool_)
    if rules.fim is not None and rules.fim.middle_only:
        offset, after_middle = 0, False
        for piece in pieces:
            if piece.middle_length is not None:
                loss[offset : offset + len(piece.tokens) - piece.middle_length] = False
                loss[offset] = after_middle  # the next file's marker ends the previous middle, so it bears loss
            offset, after_middle = offset + len(piece.tokens), piece.middle_length is not None
    return Example(tokens, loss, document)
