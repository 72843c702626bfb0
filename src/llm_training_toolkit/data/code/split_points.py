"""The tokens of a document in one row, and where the row may be cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.tokenizer import EncodedText, TextEncoder


class TextSegment(NamedTuple):
    """A text to be encoded as a whole.

    held: characters at its beginning that stay with what follows them, such as a file's path. A text that is held
    altogether is metadata, and stays with what comes after it.
    """

    text: str
    bound_length: int = 0


Segment = int | TextSegment
"""What a document is written of: a special token, or a text."""


class TokenRun(NamedTuple):
    """The tokens of an item (tokens,); `encoded` is None for a special token."""

    ids: NDArray[np.uint32]
    item: Segment
    encoded: EncodedText | None = None

    @property
    def is_bound(self) -> bool:
        """Whether it must not be parted from what comes after it."""
        return isinstance(self.item, int) or self.item.bound_length >= len(self.item.text)


def encode_segments(written: Iterable[Sequence[Segment]], encoder: TextEncoder) -> list[list[TokenRun]]:
    """The runs of many documents, each given as its items; all texts are encoded at once, on all cores."""
    written = list(written)
    texts = [item.text for items in written for item in items if isinstance(item, TextSegment)]
    encoded = iter(encoder.encode_batch(texts))
    return [
        [build_special_run(item) if isinstance(item, int) else _build_text_run(item, next(encoded)) for item in items]
        for items in written
    ]


def build_special_run(token: int) -> TokenRun:
    """The run of a special token."""
    return TokenRun(np.array([token], dtype=np.uint32), token)


def _build_text_run(item: TextSegment, encoded: EncodedText) -> TokenRun:
    return TokenRun(encoded.ids, item, encoded)


class TokenBuffer:
    """Runs one after the other, the last of them the end of the text.

    Cuts lie between characters, never within one, and none before the end of the text, which would be an example
    without anything to predict. They also leave metadata in one piece and with its code: none comes right behind a
    special token, so that no piece ends with a marker that begins nothing. Only where that would leave a piece less
    than half full, as with a path that is longer than half a sequence, metadata is cut like text.
    """

    def __init__(self, runs: Iterable[TokenRun]) -> None:
        self._runs = [run for run in runs if len(run.ids)]
        self._starts = [0, *accumulate(len(run.ids) for run in self._runs)][:-1]
        self.tokens = np.concatenate([run.ids for run in self._runs])

    def find_split_points(self, longest: Callable[[int], int]) -> list[int]:
        """Where pieces begin, the first left out. `longest(start)` is how many tokens the piece from there may have."""
        cuts: list[int] = []
        start, total = 0, len(self.tokens)
        while total - start > (length := longest(start)):
            cuts.append(start := self.find_split_point(start, min(start + length, total - 2)))
        return cuts

    def find_split_point(self, start: int, latest: int) -> int:
        """Where a piece that begins at `start` ends best: as late as can be, and at `latest` at the latest."""
        good = (at for at in range(latest, (start + latest) // 2, -1) if self._is_good_split_point(at))
        clean = (at for at in range(latest, start, -1) if self._is_character_start(at))
        # Where not even that is possible, because a character is longer than a piece, it is cut anywhere.
        return next(chain(good, clean), latest)

    def find_character_offset(self, at: int) -> int:
        """The character of its text that token `at` begins with, or is a part of."""
        run, offset = self._locate_token(at)
        assert run.encoded is not None
        return int(run.encoded.char_spans[offset, 0])

    def _locate_token(self, at: int) -> tuple[TokenRun, int]:
        index = bisect_right(self._starts, at) - 1
        return self._runs[index], at - self._starts[index]

    def _is_character_start(self, at: int) -> bool:
        run, offset = self._locate_token(at)
        return run.encoded is None or bool(run.encoded.starts_character[offset])

    def _is_good_split_point(self, at: int) -> bool:
        run, offset = self._locate_token(at)
        if offset == 0:
            return not self._locate_token(at - 1)[0].is_bound
        if run.encoded is None or isinstance(run.item, int) or run.is_bound:
            return False
        return bool(run.encoded.starts_character[offset] and run.encoded.char_spans[offset, 0] > run.item.bound_length)
