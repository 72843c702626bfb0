"""MinHash signatures of documents: of each a pure function of its text, so that any process may compute them.

Source: bigcode-dataset, near_deduplication/minhash_deduplication.py: shingles of five words, split at everything but
letters, digits and `_`, and 256 permutations. There the letters are those of ASCII; here they are those of any script,
because a text in another one would be compared by its few ASCII words alone. In a script without blanks each character
is a word.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from llm_training_toolkit.data.types import Document
from llm_training_toolkit.errors import DataError

PERMUTATIONS = 256
# Thai to Lao, Myanmar, Khmer, kana, and Chinese characters.
_WITHOUT_BLANKS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_WITHOUT_BLANKS}]|[^\W{_WITHOUT_BLANKS}]+")
_SHINGLE_WORDS = 5
# Rows of a band. With b bands of r rows a pair of similarity s becomes a candidate with probability 1 - (1 - s^r)^b:
# 0.997 at 0.8 with 8 rows. A lower threshold takes shorter bands, which give more candidates to compare.
_ROWS_BY_THRESHOLD = ((0.75, 8), (0.55, 4), (0.0, 2))
_SEED = 42
_SHINGLES_PER_UPDATE = 1 << 14


class Signature(NamedTuple):
    """Signature of a text: `values`, the bytes of (256,) uint32, and `bands`, the hash of each band in 64 bits."""

    values: bytes
    bands: list[int]


# Yields documents in their order with the signatures of their texts, in bands of the given number of rows.
SignatureRunner = Callable[[Iterator[Document], int], Iterator[tuple[Document, Signature | None]]]


def get_band_rows(threshold: float) -> int:
    """Return the rows of a band for a similarity threshold."""
    return next(rows for limit, rows in _ROWS_BY_THRESHOLD if threshold >= limit)


def sign_in_process(documents: Iterator[Document], rows: int) -> Iterator[tuple[Document, Signature | None]]:
    """Yield each document with its signature; read the next one only then."""
    return ((document, compute_signature(document.text, rows)) for document in documents)


def compute_signature(text: str, rows: int) -> Signature | None:
    """Return the signature of a text with bands of `rows` rows, None for fewer than five words.

    Raises DataError if the library rensa is missing.
    """
    hasher = load_min_hash()(num_perm=PERMUTATIONS, seed=_SEED)
    is_empty = True
    for shingles in _batch_shingles(text):
        hasher.update(shingles)
        is_empty = False
    if is_empty:
        return None
    values = np.array(hasher.digest(), dtype=np.uint32).tobytes()
    return Signature(values, _hash_bands(values, rows))


def _hash_bands(values: bytes, rows: int) -> list[int]:
    """Hash each band with its number into 64 bits, signed as in a table of SQLite."""
    width = rows * np.dtype(np.uint32).itemsize
    digests = (
        hashlib.blake2b(values[start : start + width], digest_size=8, key=start.to_bytes(4, "big")).digest()
        for start in range(0, len(values), width)
    )
    return array("q", b"".join(digests)).tolist()


@cache
def load_min_hash() -> Any:  # noqa: ANN401 - the library has no types
    """Return the MinHash class of rensa, a compiled library that nothing else needs. Raises DataError without it."""
    try:
        return importlib.import_module("rensa").RMinHash
    except ImportError as error:
        raise DataError(
            f"data.near_duplicates: the library rensa cannot be loaded ({error}). Install it: pip install rensa==0.5.0."
        ) from error


def _batch_shingles(text: str) -> Iterator[list[str]]:
    """Yield the shingles of a text in batches; a long text's are never in memory as a whole."""
    window: deque[str] = deque(maxlen=_SHINGLE_WORDS)
    batch: list[str] = []
    for word in _WORD.finditer(text):
        window.append(word[0])
        if len(window) == _SHINGLE_WORDS:
            batch.append(" ".join(window))
        if len(batch) == _SHINGLES_PER_UPDATE:
            yield batch
            batch = []
    if batch:
        yield batch
