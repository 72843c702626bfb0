"""Near-duplicates by MinHash and locality-sensitive hashing, with bounded memory.

Source: bigcode-dataset, near_deduplication/minhash_deduplication.py: shingles of five words, split at everything but
letters, digits and `_`, and 256 permutations. There a match in one band is enough, and clusters are merged; here a
candidate is a duplicate if the signatures agree in about the share `threshold`, and the document read first is kept.
There the letters are those of ASCII; here they are those of any script, because a text in another one would be compared
by its few ASCII words alone. In a script without blanks each character is a word.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import sqlite3
import tempfile
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.errors import DataError

# Thai to Lao, Myanmar, Khmer, kana, and Chinese characters.
_WITHOUT_BLANKS = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_WITHOUT_BLANKS}]|[^\W{_WITHOUT_BLANKS}]+")
_SHINGLE_WORDS = 5
_PERMUTATIONS = 256
# Rows of a band. With b bands of r rows a pair of similarity s becomes a candidate with probability 1 - (1 - s^r)^b:
# 0.997 at 0.8 with 8 rows. A lower threshold takes shorter bands, which give more candidates to compare.
_ROWS_BY_THRESHOLD = ((0.75, 8), (0.55, 4), (0.0, 2))
_SEED = 42
_SHINGLES_PER_UPDATE = 1 << 14
_MAX_CANDIDATES = 256  # compared per document; more share a band only if most of a corpus is one template
_CACHE_KIB = 1 << 16  # memory of the table on disk


class NearDuplicateIndex:
    """Signatures of the documents kept so far, in a table on disk: some 2 kB there for each, 64 MiB of memory."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._rows = next(rows for limit, rows in _ROWS_BY_THRESHOLD if threshold >= limit)
        self._hasher = load_min_hash()

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="ltt-")
        self._table = sqlite3.connect(Path(self._folder.name, "signatures.db"), isolation_level=None)
        for setting in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.execute("CREATE TABLE signature (document INTEGER PRIMARY KEY, content BLOB)")
        self._table.execute(
            "CREATE TABLE band (hash INTEGER, document INTEGER, PRIMARY KEY (hash, document)) WITHOUT ROWID"
        )
        self._table.execute("BEGIN")
        self._count = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        self._folder.cleanup()

    def add_document(self, text: str) -> bool:
        """Add a document, and return True; return False without adding it if it is near a document added before.

        A document of fewer than five words is near nothing.
        """
        signature = self._compute_signature(text)
        if signature is None:
            return True
        bands = self._hash_bands(signature)
        try:
            if self._is_near(signature, bands):
                return False
            self._count += 1
            self._table.execute("INSERT INTO signature VALUES (?, ?)", (self._count, signature.tobytes()))
            rows = ((band, self._count) for band in set(bands))
            self._table.executemany("INSERT INTO band VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{self._folder.name}: signatures of near-duplicates cannot be kept there ({error}). Let TMPDIR name a "
                "directory with 2 kB of room for each document."
            ) from error
        return True

    def _is_near(self, signature: NDArray[np.uint32], bands: list[int]) -> bool:
        marks = ", ".join("?" * len(bands))
        found = self._table.execute(
            f"SELECT content FROM signature WHERE document IN "  # noqa: S608 - question marks alone are put in
            f"(SELECT DISTINCT document FROM band WHERE hash IN ({marks}) LIMIT {_MAX_CANDIDATES})",
            bands,
        )
        # One standard error of the estimate below the threshold: otherwise half of the pairs just above it are missed.
        error = math.sqrt(self._threshold * (1 - self._threshold) / _PERMUTATIONS)
        least = (self._threshold - error) * _PERMUTATIONS
        return any(np.count_nonzero(np.frombuffer(content, np.uint32) == signature) >= least for (content,) in found)

    def _compute_signature(self, text: str) -> NDArray[np.uint32] | None:
        hasher = self._hasher(num_perm=_PERMUTATIONS, seed=_SEED)
        is_empty = True
        for shingles in _batch_shingles(text):
            hasher.update(shingles)
            is_empty = False
        return None if is_empty else np.array(hasher.digest(), dtype=np.uint32)

    def _hash_bands(self, signature: NDArray[np.uint32]) -> list[int]:
        """Hash each band with its number into 64 bits, signed as in the table."""
        values = signature.tobytes()
        width = self._rows * signature.itemsize
        digests = (
            hashlib.blake2b(values[start : start + width], digest_size=8, key=start.to_bytes(4, "big")).digest()
            for start in range(0, len(values), width)
        )
        return array("q", b"".join(digests)).tolist()


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
