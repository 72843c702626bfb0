"""Cleaning of training documents across sources: near-duplicates and text of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice, repeat
from types import TracebackType
from typing import Any, Self

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.decontamination import BenchmarkFilter, build_benchmark_sources
from llm_training_toolkit.data.prepare.min_hash import Signature, SignatureRunner, get_band_rows, load_min_hash
from llm_training_toolkit.data.prepare.near_duplicates import NearDuplicateIndex
from llm_training_toolkit.data.prepare.renderer import extract_plain_text
from llm_training_toolkit.data.sources import Document, fingerprint_sources


class DocumentCleaner:
    """Decides on every document in reading order. Conversations are compared with benchmarks alone.

    `signer` computes signatures, perhaps elsewhere and ahead of the decisions, which are made here, one after another:
    the kept documents are the same whoever signs.
    """

    def __init__(self, data: DataConfig, signer: SignatureRunner) -> None:
        self._benchmarks = None if data.decontamination is None else BenchmarkFilter(data.decontamination)
        self._threshold = None if data.near_duplicates is None else data.near_duplicates.threshold
        self._signer, self._stack = signer, ExitStack()

    def __enter__(self) -> Self:
        if self._threshold is not None:
            load_min_hash()
            self._index = self._stack.enter_context(NearDuplicateIndex(self._threshold))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def find_faults(self, documents: Iterator[Document], source: SourceConfig) -> Iterator[tuple[Document, str | None]]:
        """Yield each training document of a source with the reason why it is dropped, None to keep it.

        Reads no document behind the last one that `source.limit` keeps, however far ahead signatures are computed.
        """
        left = source.limit
        while left is None or left > 0:
            count = kept = 0
            for document, signature in self._sign(islice(documents, left), source):
                reason = self._find_fault(document, signature, source)
                count, kept = count + 1, kept + (reason is None)
                yield document, reason
            if left is None or not count:
                return
            left -= kept

    def keep_documents(
        self, documents: Iterator[Document], source: SourceConfig
    ) -> Iterator[tuple[Document, str | None]]:
        """Yield each document of a held-out source, which is kept and remembered for comparison."""
        for document, signature in self._sign(islice(documents, source.limit), source):
            self._add_document(signature)
            yield document, None

    def _sign(self, documents: Iterator[Document], source: SourceConfig) -> Iterator[tuple[Document, Signature | None]]:
        if self._threshold is None or source.format == "chat":
            return zip(documents, repeat(None))
        return self._signer(documents, get_band_rows(self._threshold))

    def _find_fault(self, document: Document, signature: Signature | None, source: SourceConfig) -> str | None:
        if self._benchmarks is not None and self._benchmarks.is_contaminated(extract_plain_text(document, source)):
            return "contaminated"
        return None if self._add_document(signature) else "near_duplicate"

    def _add_document(self, signature: Signature | None) -> bool:
        """Remember a document; return False if it is near one before it."""
        return signature is None or self._index.add_document(signature)


def build_cleaning_identity(data: DataConfig) -> list[Any]:
    """Return everything that decides which documents are dropped: settings, benchmarks, version of the hashes."""
    near, benchmarks = data.near_duplicates, data.decontamination
    return [
        None if near is None else [near.model_dump(mode="json"), load_min_hash().ALGORITHM_VERSION],
        None
        if benchmarks is None
        else [benchmarks.model_dump(mode="json"), fingerprint_sources(build_benchmark_sources(benchmarks))],
    ]
