"""Which part of which file a chunk of a document holds, as tokens and as text."""

from __future__ import annotations

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
    lead, body: its metadata and its code as text. number: among all fragments of the document.
    """

    start: int
    stop: int
    head: int
    lead: str
    body: str
    number: int


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
    passages: Sequence[Passage], files: Sequence[Span], strip: Strip, bounds: Sequence[tuple[int, int]]
) -> list[list[Fragment]]:
    """The fragments in each chunk [start, stop) of the bounds, without those that hold nothing of a file's code."""
    found: list[list[Fragment]] = []
    number = 0
    for chunk in bounds:
        inside = []
        for passage, file in zip(passages, files, strict=True):
            if file.first < chunk[1] and chunk[0] < file.end:
                inside.append(_fragment(strip, passage, file, chunk, number))
                number += 1
        found.append([fragment for fragment in inside if fragment.body])
    return found


def _fragment(strip: Strip, passage: Passage, file: Span, chunk: tuple[int, int], number: int) -> Fragment:
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
        number,
    )
