"""The tokens of a text, and where in the text they stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.uint32]
Spans = NDArray[np.int64]


class Encoded:
    """Token ids of a text (tokens,); where they stand is worked out when it is asked for.

    Most texts are never asked: they are not cut. Having the library follow the offsets of all of them takes it half
    as long again, and ten times the memory of the ids.
    """

    def __init__(self, text: str, ids: Ids, spans_of: Callable[[str, Ids], Spans]) -> None:
        self.ids = ids
        self._text, self._spans_of = text, spans_of

    @cached_property
    def spans(self) -> Spans:
        """(tokens, 2): the characters [start, stop) of the text that each token has a part in."""
        return self._spans_of(self._text, self.ids)

    @cached_property
    def clean(self) -> NDArray[np.bool_]:
        """(tokens,): whether a character begins where the token begins."""
        return np.concatenate([[True], self.spans[:-1, 1] <= self.spans[1:, 0]])[: len(self.ids)]


def spans_of_bytes(text: str, sizes: NDArray[np.int64]) -> Spans | None:
    """(tokens, 2): the characters of a text that each token has a part in, from the bytes each token stands for.

    None where the tokens do not stand for as many bytes as the text has.
    """
    written = np.frombuffer(text.encode(), dtype=np.uint8)
    ends = np.cumsum(sizes)
    if sizes.sum() != len(written):
        return None
    if len(written) == len(text):  # every character is a byte
        return np.stack([ends - sizes, ends], axis=1)
    character = np.cumsum((written & 0xC0) != 0x80) - 1  # which one each byte belongs to; 10xxxxxx goes on with one
    return np.stack([character[ends - sizes], character[ends - 1] + 1], axis=1)
