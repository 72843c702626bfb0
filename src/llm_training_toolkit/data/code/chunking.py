"""Chunking: documents are split into chunks that fit into a sequence even after FIM has lengthened them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from llm_training_toolkit.data.code.fim import UniformDraw
from llm_training_toolkit.data.code.repo_format import FileSegment
from llm_training_toolkit.data.code.rules import RenderRules
from llm_training_toolkit.data.code.split_points import TokenBuffer, TokenRun
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Ids
from llm_training_toolkit.errors import DataError

_SENTINELS = 3
# Tokens kept free per FIM cut that lands inside a token, which splits into 1.3 more tokens on average.
# Lower: more chunks overflow and leave a few tokens behind as a short chunk. Higher: sequences are under-filled.
# With 2.5, at 256 tokens and everything rearranged, sequences are 99.1 % full and 7 in 100 chunks are short.
_SLACK_PER_CUT = 2.5


class TokenizedDocument(NamedTuple):
    """A tokenized document: its number, file segments, plain tokens with the end of text, and file positions."""

    number: int
    document: Document
    file_segments: list[FileSegment]
    buffer: TokenBuffer
    files: list[FileSpan]

    def draw_fim_for_part(self, named: str, rules: RenderRules) -> UniformDraw | None:
        """Draw the random numbers of a part, or None if it stays plain."""
        return rules.draw_fim_for_part(self.number, self.document, named)

    def iter_part_starts(self, start: int) -> Iterator[tuple[int, str]]:
        """Yield (position, key) of each part from a token on: the rest of the file there, then whole files."""
        first = bisect_right(self.files, start, key=lambda file: file.end)
        begun, lead = self.files[first], len(self.file_segments[first].lead)
        at = max(self.buffer.find_character_offset(start) - lead, 0) if start > begun.text_start else 0
        yield start, build_part_key(first, at)
        for number in range(first + 1, len(self.files)):
            yield self.files[number].head_start, build_part_key(number, 0)


class Chunk(NamedTuple):
    """Tokens [start, stop) of a document, without its end of text, and the file spans in them."""

    tokenized: TokenizedDocument
    start: int
    stop: int
    spans: list[ChunkSpan]

    @property
    def tokens(self) -> Ids:
        """Plain tokens of the chunk."""
        return self.tokenized.buffer.tokens[self.start : self.stop]

    @property
    def is_last(self) -> bool:
        """True if the document's end of text follows the chunk."""
        return self.stop == len(self.tokenized.buffer.tokens) - 1


def split_into_chunks(work: TokenizedDocument, rules: RenderRules) -> list[Chunk]:
    """Split a document into chunks: one if it fits, an empty list if it is dropped.

    Raises DataError, naming the document, if it is too long and `rules.overlong` is `error`.
    """
    total = len(work.buffer.tokens)
    if total <= rules.sequence_length:
        return [_build_chunk(work, 0, total - 1, rules)]
    if rules.overlong == "drop":
        return []
    if rules.overlong == "error":
        raise DataError(
            f"{work.document.name}: {total} tokens, longer than data.sequence_length {rules.sequence_length}. "
            "Set overlong: split or drop for this source, raise data.sequence_length, or shorten the document."
        )
    added = _SENTINELS + _estimate_split_tokens(work)
    cuts = work.buffer.find_split_points(lambda start: _compute_max_chunk_tokens(work, start, added, rules))
    return [_build_chunk(work, start, stop, rules) for start, stop in pairwise([0, *cuts, total - 1])]


def split_chunk_to_fit(chunk: Chunk, tokens: int, rules: RenderRules) -> list[Chunk]:
    """Split a chunk that lacks room for `tokens` tokens in two: the shortened chunk, and its end as a chunk of its own.

    Return [] for a whole document, which fits as it is, and if less than half a sequence would be left.
    """
    latest = chunk.stop - max(tokens, 2)  # a single token has nothing to predict
    if (chunk.start == 0 and chunk.is_last) or latest - chunk.start < rules.sequence_length // 2:
        return []
    cut = chunk.tokenized.buffer.find_split_point(chunk.start, latest)
    return [
        _build_chunk(chunk.tokenized, start, stop, rules) for start, stop in pairwise([chunk.start, cut, chunk.stop])
    ]


def _build_chunk(work: TokenizedDocument, start: int, stop: int, rules: RenderRules) -> Chunk:
    inside = find_chunk_spans(work.file_segments, work.files, work.buffer, start, stop) if rules.fim else []
    return Chunk(work, start, stop, inside)


def _estimate_split_tokens(work: TokenizedDocument) -> int:
    """Estimate the tokens that FIM adds to a file, from the share of character positions inside tokens."""
    characters = sum(len(passage.body) for passage in work.file_segments)
    return max(round(2 * _SLACK_PER_CUT * (1 - len(work.buffer.tokens) / characters)), 0)


def _compute_max_chunk_tokens(work: TokenizedDocument, start: int, added: int, rules: RenderRules) -> int:
    """Return the maximum length of a chunk from `start`: a sequence minus the tokens that FIM will add.

    The FIM draw of a part depends on its start alone, so it is known before the chunk is split off.
    """
    if rules.fim is None:
        return rules.sequence_length
    longest, needs_end = rules.sequence_length, False
    for offset, named in work.iter_part_starts(start):
        if offset >= start + longest:
            break
        needs_end = work.draw_fim_for_part(named, rules) is not None
        longest -= added * needs_end
    # A middle moved to the end of a chunk needs an end of text.
    return max(longest - needs_end, rules.sequence_length // 2)


class FileSpan(NamedTuple):
    """Token positions of a file in its document: start of its head, start of its text, and end."""

    head_start: int
    text_start: int
    end: int


class ChunkSpan(NamedTuple):
    """The part of a file that lies in a chunk.

    start, stop: its tokens [start, stop) in the chunk. head: number of them that are special tokens and texts in front.
    lead, body: its metadata and its code as text. part: its key from `build_part_key`.
    """

    start: int
    stop: int
    head: int
    lead: str
    body: str
    part: str


def build_part_key(file: int, character: int) -> str:
    """Return the key of a document part: a file, or the rest of a file from a character on.

    The key seeds the random numbers, is known before the part's end, and is the same for every tokenizer.
    """
    return f"{file}+{character}" if character else f"{file}"


def find_file_spans(passages: Sequence[FileSegment], runs: Sequence[TokenRun]) -> list[FileSpan]:
    """Locate the files of a document in its tokens."""
    found, offset, following = [], 0, iter(runs)
    for passage in passages:
        text = offset + sum(len(next(following).ids) for _ in passage.head)
        end = text + len(next(following).ids)
        found.append(FileSpan(offset, text, end))
        offset = end
    return found


def find_chunk_spans(
    passages: Sequence[FileSegment], files: Sequence[FileSpan], strip: TokenBuffer, start: int, stop: int
) -> list[ChunkSpan]:
    """Return the file spans in tokens [start, stop), except those without any code."""
    # Bisect, because a repository may have thousands of files and as many chunks.
    first = bisect_right(files, start, key=lambda file: file.end)
    last = bisect_left(files, stop, key=lambda file: file.head_start)
    found = (
        _build_chunk_span(strip, number, passages[number], files[number], (start, stop))
        for number in range(first, last)
    )
    return [fragment for fragment in found if fragment.body]


def _build_chunk_span(
    strip: TokenBuffer, number: int, passage: FileSegment, file: FileSpan, chunk: tuple[int, int]
) -> ChunkSpan:
    """Build a file's span in a chunk; its text ends at the next span's first character, so every character is kept.

    If a split falls inside a file's metadata, the body is empty and the file stays plain.
    """
    start, stop = chunk
    is_first, lead = start <= file.head_start, len(passage.lead)
    begin = strip.find_character_offset(start) - lead if start > file.text_start else 0 if is_first else -1
    close = len(passage.body)
    if stop < file.end:
        close = min(close, strip.find_character_offset(stop) - lead) if stop > file.text_start else 0
    return ChunkSpan(
        max(start, file.head_start) - start,
        min(stop, file.end) - start,
        file.text_start - file.head_start if is_first else 0,
        passage.lead if is_first else "",
        passage.body[begin : max(close, 0)] if begin >= 0 else "",
        build_part_key(number, max(begin, 0)),
    )
