"""Cleaning of training documents across sources: near-duplicates and text of benchmarks."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.data.prepare.decontamination import BenchmarkFilter, build_benchmark_sources
from llm_training_toolkit.data.prepare.near_duplicates import NearDuplicateIndex, load_min_hash
from llm_training_toolkit.data.prepare.renderer import extract_plain_text
from llm_training_toolkit.data.sources import Document, fingerprint_sources


class DocumentCleaner:
    """Decides on every document in reading order. Conversations are compared with benchmarks alone."""

    def __init__(self, data: DataConfig) -> None:
        self._sources = (*data.sources, *data.eval.sources)
        self._benchmarks = None if data.decontamination is None else BenchmarkFilter(data.decontamination)
        self._index = None if data.near_duplicates is None else NearDuplicateIndex(data.near_duplicates.threshold)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._index is not None:
            self._stack.enter_context(self._index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def find_fault(self, document: Document) -> str | None:
        """Return the reason why a training document is dropped, None to keep it."""
        if self._benchmarks is not None:
            text = extract_plain_text(document, self._sources[document.source])
            if self._benchmarks.is_contaminated(text):
                return "contaminated"
        return None if self.add_document(document) else "near_duplicate"

    def add_document(self, document: Document) -> bool:
        """Remember a document for comparison; return False if it is near one before it."""
        if self._index is None or self._sources[document.source].format == "chat":
            return True
        return self._index.add_document(document.text)


def build_cleaning_identity(data: DataConfig) -> list[Any]:
    """Return everything that decides which documents are dropped: settings, benchmarks, version of the hashes."""
    near, benchmarks = data.near_duplicates, data.decontamination
    return [
        None if near is None else [near.model_dump(mode="json"), load_min_hash().ALGORITHM_VERSION],
        None
        if benchmarks is None
        else [benchmarks.model_dump(mode="json"), fingerprint_sources(build_benchmark_sources(benchmarks))],
    ]
