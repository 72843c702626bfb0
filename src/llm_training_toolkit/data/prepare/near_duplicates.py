"""Near-duplicates by MinHash and locality-sensitive hashing, with bounded memory.

In BigCode's script, the source of the signatures (`min_hash.py`), a match in one band is enough, and clusters are
merged. Here a candidate is a duplicate if the signatures agree in about the share `threshold`, and the document read
first is kept.
"""

from __future__ import annotations

import math
import sqlite3
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from llm_training_toolkit.data.prepare.min_hash import PERMUTATIONS, Signature
from llm_training_toolkit.errors import DataError

_MAX_CANDIDATES = 256  # compared per document; more share a band only if most of a corpus is one template
_CACHE_KIB = 1 << 16  # memory of the table on disk


class NearDuplicateIndex:
    """Signatures of the documents kept so far, in a table on disk: some 2 kB there for each, 64 MiB of memory."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold

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

    def add_document(self, signature: Signature | None) -> bool:
        """Add a document, and return True; return False without adding it if it is near a document added before.

        A document of fewer than five words has no signature, and is near nothing.
        """
        if signature is None:
            return True
        try:
            if self._is_near(signature):
                return False
            self._count += 1
            self._table.execute("INSERT INTO signature VALUES (?, ?)", (self._count, signature.values))
            rows = ((band, self._count) for band in set(signature.bands))
            self._table.executemany("INSERT INTO band VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{self._folder.name}: signatures of near-duplicates cannot be kept there ({error}). Let TMPDIR name a "
                "directory with 2 kB of room for each document."
            ) from error
        return True

    def _is_near(self, signature: Signature) -> bool:
        marks = ", ".join("?" * len(signature.bands))
        found = self._table.execute(
            f"SELECT content FROM signature WHERE document IN "  # noqa: S608 - question marks alone are put in
            f"(SELECT DISTINCT document FROM band WHERE hash IN ({marks}) LIMIT {_MAX_CANDIDATES})",
            signature.bands,
        )
        # One standard error of the estimate below the threshold: otherwise half of the pairs just above it are missed.
        error = math.sqrt(self._threshold * (1 - self._threshold) / PERMUTATIONS)
        least = (self._threshold - error) * PERMUTATIONS
        values = np.frombuffer(signature.values, np.uint32)
        return any(np.count_nonzero(np.frombuffer(content, np.uint32) == values) >= least for (content,) in found)
