"""Tokens of a document in one buffer, and the positions at which it may be split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.tokenizer import EncodedText, TextEncoder


class TextSegment(NamedTuple):
    """A text that is encoded as a whole.

    bound_length: leading characters that must stay with the text after them, such as a file's path. A fully bound text
    is metadata and stays with the next segment.
    """

    text: str
    bound_length: int = 0


Segment = int | TextSegment  # a special token's id, or a text


class TokenRun(NamedTuple):
    """Tokens of a segment (tokens,); `encoded` is None for a special token."""

    ids: NDArray[np.uint32]
    item: Segment
    encoded: EncodedText | None = None

    @property
    def is_bound(self) -> bool:
        """True if the run must stay with the next one."""
        return isinstance(self.item, int) or self.item.bound_length >= len(self.item.text)


def encode_segments(written: Iterable[Sequence[Segment]], encoder: TextEncoder) -> list[list[TokenRun]]:
    """Encode the segments of many documents into runs; all texts go in one batch, on all cores."""
    written = list(written)
    texts = [item.text for items in written for item in items if isinstance(item, TextSegment)]
    encoded = iter(encoder.encode_batch(texts))
    return [
        [build_special_run(item) if isinstance(item, int) else _build_text_run(item, next(encoded)) for item in items]
        for items in written
    ]


def build_special_run(token: int) -> TokenRun:
    """Build the run of a special token."""
    return TokenRun(np.array([token], dtype=np.uint32), token)


def _build_text_run(item: TextSegment, encoded: EncodedText) -> TokenRun:
    return TokenRun(encoded.ids, item, encoded)


class TokenBuffer:
    """Concatenated token runs of a document; the last run is the end of text.

    Splits fall between characters. A split right before the end of text is avoided: it would leave an example with
    nothing to predict. Metadata stays whole and with its code: a split right after a special token would leave a
    dangling marker. If that makes a piece less than half full, as with a path longer than half a sequence, metadata is
    split like text.
    """

    def __init__(self, runs: Iterable[TokenRun]) -> None:
        self._runs = [run for run in runs if len(run.ids)]
        self._starts = [0, *accumulate(len(run.ids) for run in self._runs)][:-1]
        self.tokens = np.concatenate([run.ids for run in self._runs])

    def find_split_points(self, longest: Callable[[int], int]) -> list[int]:
        """Return the starts of all pieces but the first; `longest(start)` limits the tokens of a piece."""
        cuts: list[int] = []
        start, total = 0, len(self.tokens)
        while total - start > (length := longest(start)):
            cuts.append(start := self.find_split_point(start, min(start + length, total - 2)))
        return cuts

    def find_split_point(self, start: int, latest: int) -> int:
        """Return the best end of a piece that begins at `start`: as late as possible, at most `latest`."""
        good = (at for at in range(latest, (start + latest) // 2, -1) if self._is_good_split_point(at))
        clean = (at for at in range(latest, start, -1) if self._is_character_start(at))
        # Last resort: a character longer than a piece is split anywhere.
        return next(chain(good, clean), latest)

    def find_character_offset(self, at: int) -> int:
        """Return the offset, in its run's text, of the character that token `at` begins with or is part of."""
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
