"""Which part of which file a chunk of a document holds, as tokens and as text."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from llm_training_toolkit.data.layout import Passage
from llm_training_toolkit.data.strip import Run, Strip


class Span(NamedTuple):
    """A file's tokens within its document: where its head begins, where its text begins, and where it ends."""

    first: int
    text: int
    end: int


class Fragment(NamedTuple):
    """What a chunk holds of a file.

    start, stop: its tokens [start, stop) in the chunk. head: how many of them are special tokens and texts in front.
    lead, body: its metadata and its code as text. part: what it is of the document, as `part` names it.
    """

    start: int
    stop: int
    head: int
    lead: str
    body: str
    part: str


def part(file: int, character: int) -> str:
    """The name of a part of a document: a file, or what goes on in it with a character.

    Random numbers are drawn by it. It is known before the part's end is, and the same for every tokenizer.
    """
    return f"{file}+{character}" if character else f"{file}"


def spans(passages: Sequence[Passage], runs: Sequence[Run]) -> list[Span]:
    """Where the files of a document lie in it."""
    found, place, following = [], 0, iter(runs)
    for passage in passages:
        text = place + sum(len(next(following).ids) for _ in passage.head)
        end = text + len(next(following).ids)
        found.append(Span(place, text, end))
        place = end
    return found


def fragments(
    passages: Sequence[Passage], files: Sequence[Span], strip: Strip, start: int, stop: int
) -> list[Fragment]:
    """What the tokens [start, stop) hold of the files, without fragments that hold nothing of a file's code."""
    # Only the files that lie there are looked at: a repository may have thousands, and as many chunks.
    first = bisect_right(files, start, key=lambda file: file.end)
    last = bisect_left(files, stop, key=lambda file: file.first)
    found = (_fragment(strip, number, passages[number], files[number], (start, stop)) for number in range(first, last))
    return [fragment for fragment in found if fragment.body]


def _fragment(strip: Strip, number: int, passage: Passage, file: Span, chunk: tuple[int, int]) -> Fragment:
    """A fragment's text reaches to the next one's first character, so that no character falls between two.

    Where a cut had to part a file's metadata, the fragment has no body: the file stays as it is.
    """
    start, stop = chunk
    is_first, lead = start <= file.first, len(passage.lead)
    begin = strip.character(start) - lead if start > file.text else 0 if is_first else -1
    close = len(passage.body)
    if stop < file.end:
        close = min(close, strip.character(stop) - lead) if stop > file.text else 0
    return Fragment(
        max(start, file.first) - start,
        min(stop, file.end) - start,
        file.text - file.first if is_first else 0,
        passage.lead if is_first else "",
        passage.body[begin : max(close, 0)] if begin >= 0 else "",
        part(number, max(begin, 0)),
    )
