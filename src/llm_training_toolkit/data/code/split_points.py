"""The tokens of a document in one row, and where the row may be cut."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.data.tokenizer import Encoded, TextEncoder


class Text(NamedTuple):
    """A text to be encoded as a whole.

    held: characters at its beginning that stay with what follows them, such as a file's path. A text that is held
    altogether is metadata, and stays with what comes after it.
    """

    text: str
    held: int = 0


Item = int | Text
"""What a document is written of: a special token, or a text."""


class Run(NamedTuple):
    """The tokens of an item (tokens,); `encoded` is None for a special token."""

    ids: NDArray[np.uint32]
    item: Item
    encoded: Encoded | None = None

    @property
    def is_bound(self) -> bool:
        """Whether it must not be parted from what comes after it."""
        return isinstance(self.item, int) or self.item.held >= len(self.item.text)


def encode(written: Iterable[Sequence[Item]], encoder: TextEncoder) -> list[list[Run]]:
    """The runs of many documents, each given as its items; all texts are encoded at once, on all cores."""
    written = list(written)
    texts = [item.text for items in written for item in items if isinstance(item, Text)]
    encoded = iter(encoder.encode_batch(texts))
    return [
        [special(item) if isinstance(item, int) else _run(item, next(encoded)) for item in items] for items in written
    ]


def special(token: int) -> Run:
    """The run of a special token."""
    return Run(np.array([token], dtype=np.uint32), token)


def _run(item: Text, encoded: Encoded) -> Run:
    return Run(encoded.ids, item, encoded)


class Strip:
    """Runs one after the other, the last of them the end of the text.

    Cuts lie between characters, never within one, and none before the end of the text, which would be an example
    without anything to predict. They also leave metadata in one piece and with its code: none comes right behind a
    special token, so that no piece ends with a marker that begins nothing. Only where that would leave a piece less
    than half full, as with a path that is longer than half a sequence, metadata is cut like text.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = [run for run in runs if len(run.ids)]
        self._starts = [0, *accumulate(len(run.ids) for run in self._runs)][:-1]
        self.tokens = np.concatenate([run.ids for run in self._runs])

    def cuts(self, longest: Callable[[int], int]) -> list[int]:
        """Where pieces begin, the first left out. `longest(start)` is how many tokens the piece from there may have."""
        cuts: list[int] = []
        start, total = 0, len(self.tokens)
        while total - start > (length := longest(start)):
            cuts.append(start := self.cut(start, min(start + length, total - 2)))
        return cuts

    def cut(self, start: int, latest: int) -> int:
        """Where a piece that begins at `start` ends best: as late as can be, and at `latest` at the latest."""
        good = (at for at in range(latest, (start + latest) // 2, -1) if self._is_good(at))
        clean = (at for at in range(latest, start, -1) if self._is_clean(at))
        # Where not even that is possible, because a character is longer than a piece, it is cut anywhere.
        return next(chain(good, clean), latest)

    def character(self, at: int) -> int:
        """The character of its text that token `at` begins with, or is a part of."""
        run, offset = self._find(at)
        assert run.encoded is not None
        return int(run.encoded.spans[offset, 0])

    def _find(self, at: int) -> tuple[Run, int]:
        index = bisect_right(self._starts, at) - 1
        return self._runs[index], at - self._starts[index]

    def _is_clean(self, at: int) -> bool:
        run, offset = self._find(at)
        return run.encoded is None or bool(run.encoded.clean[offset])

    def _is_good(self, at: int) -> bool:
        run, offset = self._find(at)
        if offset == 0:
            return not self._find(at - 1)[0].is_bound
        if run.encoded is None or isinstance(run.item, int) or run.is_bound:
            return False
        return bool(run.encoded.clean[offset] and run.encoded.spans[offset, 0] > run.item.held)
