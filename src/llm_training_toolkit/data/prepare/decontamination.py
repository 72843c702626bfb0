"""Decontamination: documents that share a sequence of words with a benchmark.

Source: Qwen2.5-Coder, finetuning/sft/utils/decont.py and its report (Hui et al. 2024): a document is dropped if it
shares 10 words in sequence with a test set. Words are compared without case and punctuation.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from llm_training_toolkit.config.data_config import DecontaminationConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.sources.decompress import open_decompressed
from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import FileFormat, SourceFile, detect_file_format
from llm_training_toolkit.data.sources.find import list_source_files
from llm_training_toolkit.data.sources.records import read_source_records
from llm_training_toolkit.data.sources.text import decode_utf8
from llm_training_toolkit.errors import DataError

_WORD = re.compile(r"\w+")


class BenchmarkFilter:
    """Word sequences of the benchmarks of a configuration, all in memory: they are small beside any corpus."""

    def __init__(self, config: DecontaminationConfig) -> None:
        """Read the benchmarks. Raises DataError for a path that lacks files or a sequence of words."""
        self._words = config.ngram_words
        self._sequences: set[str] = set()
        for source in build_benchmark_sources(config):
            before = len(self._sequences)
            for file in list_source_files(source):
                for text in _read_benchmark_texts(file, source.max_document_bytes):
                    self._sequences.update(_iter_sequences(text, self._words))
            if len(self._sequences) == before:
                raise DataError(
                    f"data.decontamination: {redact_uri(source.path)!r} holds no text of {self._words} words that "
                    "is not in a path before it. Correct the path, or lower ngram_words."
                )

    def is_contaminated(self, text: str) -> bool:
        """Return whether a text shares a sequence of words with a benchmark."""
        return any(sequence in self._sequences for sequence in _iter_sequences(text, self._words))


def build_benchmark_sources(config: DecontaminationConfig) -> list[SourceConfig]:
    """Return the benchmarks as sources of text, for listing and fingerprinting their files."""
    return [SourceConfig(path=path, format="text") for path in config.paths]


def _read_benchmark_texts(file: SourceFile, max_bytes: int) -> Iterator[str]:
    """Yield every text of a file: all strings of its records, or the whole file."""
    kind = detect_file_format(file.relative, "text")
    try:
        if kind is FileFormat.WHOLE:
            with open_decompressed(file) as stream:
                content = stream.read(max_bytes + 1)
            if len(content) > max_bytes:
                raise DataError(
                    f"data.decontamination: {file.display_path} has more than {max_bytes >> 20} MiB, the maximum of a "
                    "benchmark read as a whole. Split it into smaller files, or write its texts as records of a .jsonl "
                    "file."
                )
            yield decode_utf8(content, file.display_path)
            return
        for record in read_source_records(file, kind, list, max_bytes=max_bytes):
            if isinstance(record, UnreadableDocument):
                raise record
            yield from _iter_strings(record.value)
    except UnreadableDocument as error:
        raise DataError(f"data.decontamination: {error}. Repair the benchmark, or remove it from paths.") from error


def _iter_strings(value: Any) -> Iterator[str]:  # noqa: ANN401 - whatever JSON can say
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for each in inner:
            yield from _iter_strings(each)


def _iter_sequences(text: str, words: int) -> Iterator[str]:
    window: deque[str] = deque(maxlen=words)
    for word in _WORD.finditer(text.lower()):
        window.append(word[0])
        if len(window) == words:
            yield " ".join(window)
