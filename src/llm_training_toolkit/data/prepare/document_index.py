"""Index of all documents, with those held out, built before rendering."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.prepare.arrow_store import read_array, read_column, write_columns, write_rows
from llm_training_toolkit.data.prepare.cleaning import DocumentCleaner
from llm_training_toolkit.data.prepare.min_hash import SignatureRunner, sign_in_process
from llm_training_toolkit.data.sources import (
    Document,
    DocumentStats,
    check_faults,
    content_hash,
    iter_content_hashes,
    keep_duplicates,
    list_source_files,
    read_source_documents,
    write_fault_report,
)
from llm_training_toolkit.errors import DataError

_PROGRESS_EVERY = 256
_CHARACTERS_PER_SHARD = 1 << 25  # about ten million tokens: half a minute of one core's work, and a file of 40 MB
# Partitions then differ from each other by about an eighth at most. A file is read in about a dozen pieces for each.
# With this number or the size of a shard, the order of runs with partitions changes: give FORMAT_VERSION another value.
BLOCKS_PER_PARTITION = 8
_SCHEMA = pa.schema(
    [("source", pa.int32()), ("name", pa.large_string()), ("hash", pa.binary(16)), ("characters", pa.int64())]
)


class DocumentShard(NamedTuple):
    """A unit of rendering work: the documents [first, stop) of a source."""

    source: int
    first: int
    stop: int


@dataclass(frozen=True)
class DocumentIndex:
    """The documents in reading order; what each source dropped, by reason, and how many files it cut.

    sources (documents,) int32: source number, as in `list_all_sources`; documents of one source are contiguous.
    hashes (documents, 16) uint8: content hash. characters (documents,) int64: length.
    held (documents,) bool: True if held out. names: memory-mapped Arrow text.
    """

    sources: NDArray[np.int32]
    hashes: NDArray[np.uint8]
    characters: NDArray[np.int64]
    held: NDArray[np.bool_]
    names: Any
    dropped: list[dict[str, int]]
    cut: list[int]

    @classmethod
    def read(cls, directory: Path) -> DocumentIndex:
        """Open a written index."""
        file = directory / "documents.arrow"
        stats = json.loads((directory / "stats.json").read_text(encoding="utf-8"))
        held = read_array(directory / "held.arrow", "held").astype(np.bool_)
        sources, content, characters = (read_array(file, name) for name in ("source", "hash", "characters"))
        return cls(sources, content, characters, held, read_column(file, "name"), **stats)

    def get_source_rows(self, source: int) -> range:
        """Return the rows of a source's documents."""
        rows = np.flatnonzero(self.sources == source)
        return range(int(rows[0]), int(rows[-1]) + 1) if len(rows) else range(0)

    def get_source_characters(self, source: int) -> NDArray[np.int64]:
        """Return the lengths of a source's documents."""
        rows = self.get_source_rows(source)
        return self.characters[rows.start : rows.stop]

    def count_documents(self, *, held: bool, source: int | None = None) -> int:
        """Count the held-out documents, or the others, of one source or all."""
        counted = self.held if held else ~self.held
        return int(np.count_nonzero(counted if source is None else counted & (self.sources == source)))

    def count_shard_documents(self, shards: Sequence[DocumentShard], *, held: bool) -> int:
        """Count the held-out documents of some shards, or the others."""
        return int(self.sum_by_shard(self.held == held, shards).sum())

    def sum_by_shard(self, values: NDArray[Any], shards: Sequence[DocumentShard]) -> NDArray[np.int64]:
        """Return the sum of `values` (documents,) over each shard."""
        # The rows of a source are searched in the whole index: once per source, not once per shard.
        starts = {source: self.get_source_rows(source).start for source in {shard.source for shard in shards}}
        return np.array([values[starts[s] + first : starts[s] + stop].sum() for s, first, stop in shards], np.int64)


def split_into_shards(
    data: DataConfig, document_index: DocumentIndex, sources: Sequence[int], *, held: bool, partitions: int = 1
) -> list[DocumentShard]:
    """Split the documents of some sources into shards; shards without any document on the side `held` are omitted.

    Shards are smaller where each of the `partitions` would have fewer than `BLOCKS_PER_PARTITION`. A source of whole
    repositories is one shard: they are assembled from files all over the source.
    """
    found: list[DocumentShard] = []
    size = _CHARACTERS_PER_SHARD
    if partitions > 1:
        total = sum(int(document_index.get_source_characters(source).sum()) for source in sources)
        size = min(size, total // (partitions * BLOCKS_PER_PARTITION) + 1)
    for source in sources:
        rows = document_index.get_source_rows(source)
        filled = np.cumsum(document_index.get_source_characters(source)) // size
        cuts = (
            (np.flatnonzero(np.diff(filled)) + 1).tolist() if list_all_sources(data)[source].group_by == "file" else []
        )
        for first, stop in pairwise([0, *cuts, len(rows)]):
            if (document_index.held[rows.start + first : rows.start + stop] == held).any():
                found.append(DocumentShard(source, first, stop))
    return found


def verify_document_index(
    data: DataConfig, directory: Path, progress: Callable[[int], None], *, signer: SignatureRunner = sign_in_process
) -> None:
    """Read all documents again, compare them with the index in `directory`, and raise DataError at the first
    difference.

    The index lies in the prepared data's directory, which the error names: only its removal triggers a rebuild.
    """
    previous = DocumentIndex.read(directory)
    with tempfile.TemporaryDirectory(prefix="ltt-") as folder:
        build_document_index(data, Path(folder), progress, signer=signer)
        now = DocumentIndex.read(Path(folder))
    shorter = min(len(previous.sources), len(now.sources))
    same = (previous.hashes[:shorter] == now.hashes[:shorter]).all(axis=1) & (
        previous.sources[:shorter] == now.sources[:shorter]
    )
    different = int(np.argmin(same)) if not same.all() else shorter
    if different == len(previous.sources) == len(now.sources):
        return
    one = now if different < len(now.sources) else previous
    path = list_all_sources(data)[one.sources[different]].path
    raise DataError(
        f"{path}: {one.names[different]} is not what was prepared ({len(previous.sources):,} documents then, "
        f"{len(now.sources):,} now). Remove {directory.parent} and prepare again; a run that has begun on it needs the "
        "documents as they were."
    )


def list_all_sources(data: DataConfig) -> tuple[SourceConfig, ...]:
    """Return the training sources, then those of `data.eval.sources`; a source's number is its position."""
    return (*data.sources, *data.eval.sources)


def build_document_index(
    data: DataConfig,
    directory: Path,
    progress: Callable[[int], None],
    *,
    signer: SignatureRunner = sign_in_process,
    report: Path | None = None,
) -> None:
    """Read every document once and write the index into an existing directory.

    A document found in two sources counts for the first; one found in the evaluation counts for it alone. Takes about
    130 bytes of memory per document. The file `report` lists unreadable documents; `signer` computes the signatures of
    near-duplicates.

    Raises DataError for all of them at once, unless data.on_error and data.max_skipped allow them. Also raises it for a
    path without files, an unreachable store, and an empty training or evaluation set.
    """
    tallies = [DocumentStats() for _ in list_all_sources(data)]
    split_hashes, sizes = array("Q"), array("q")

    def iter_rows() -> Iterator[tuple[int, str, bytes, int]]:
        for document in _read_all_documents(data, tallies, signer):
            split_hashes.append(_compute_split_hash(document, data.eval.split_by))
            sizes.append(len(document.text))
            if len(split_hashes) % _PROGRESS_EVERY == 0:
                progress(len(split_hashes))
            yield document.source, document.name, document.content_digest, len(document.text)

    write_rows(directory / "documents.arrow", _SCHEMA, iter_rows())
    progress(len(split_hashes))
    if report is not None:
        write_fault_report(report, [redact_uri(source.path) for source in list_all_sources(data)], tallies)
    check_faults(tallies, skips=data.on_error == "skip", max_skipped=data.max_skipped, report=report)
    given = sum(tally.kept for tally in tallies[len(data.sources) :])
    _check_documents_left(data.sources, len(split_hashes) - given, "sources")
    _check_documents_left(data.eval.sources, given, "eval.sources")
    chosen = select_held_out(
        np.array(split_hashes[given:], dtype=np.uint64), np.array(sizes[given:], dtype=np.int64), data.eval.fraction
    )
    if data.eval.split_by == "repository" and data.eval.fraction > 0.0 and not chosen.any():
        raise DataError(
            "data.eval.split_by: repository holds out nothing, because all documents are of one repository. Set it to "
            "document, or data.eval.fraction to 0."
        )
    write_columns(directory / "held.arrow", {"held": np.concatenate([np.ones(given, dtype=np.bool_), chosen])})
    stats = {
        "dropped": [dict(sorted((tally.dropped + tally.skipped).items())) for tally in tallies],
        "cut": [tally.cut for tally in tallies],
    }
    (directory / "stats.json").write_text(json.dumps(stats), encoding="utf-8")


def select_held_out(split_hashes: NDArray[np.uint64], sizes: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """Return the mask of held-out documents: those with a hash, read as a number in [0, 1), below the fraction.

    `split_hashes` (documents,) keep a document on its side when others are added or removed. Equal hashes stay
    together, as one unit. `sizes` (documents,) in characters make the fraction one of the text, too, within limits:

    1. A unit larger than the whole share, and than four typical (median) units, stays in training.
    2. Units are held out in the order of their hashes until they exceed twice the share and eight typical units.

    With a fraction above 0 and two or more distinct hashes, at least one is held out and at least one stays.
    """
    if fraction == 0.0 or len(split_hashes) == 0 or split_hashes.min() == split_hashes.max():
        return np.zeros(len(split_hashes), dtype=np.bool_)
    units, unit_of = np.unique(split_hashes, return_inverse=True)
    lengths = np.bincount(unit_of, weights=sizes)
    share, typical = fraction * lengths.sum(), np.median(lengths)
    fitting = lengths <= max(share, 4 * typical)
    candidates = (units.astype(np.float64) * 2.0**-64 < fraction) & fitting
    if not candidates.any():
        candidates[np.argmax(fitting)] = True
    limit = max(2 * share + 8 * typical, lengths[np.argmax(candidates)])
    held = candidates & (np.cumsum(lengths * candidates) <= limit)
    held[-1] &= not held.all()
    chosen: NDArray[np.bool_] = held[unit_of]
    return chosen


class DocumentReader:
    """Reads indexed documents again, from the start of any shard."""

    def __init__(self, data: DataConfig, document_index: DocumentIndex) -> None:
        self._data, self._document_index, self._sources = data, document_index, list_all_sources(data)
        self._files = cache(lambda source: list_source_files(self._sources[source]))
        # End of the last shard: the next one often begins there and then skips re-reading its file.
        self._reached: tuple[tuple[int, int], Iterator[Document]] | None = None

    def read_documents(self, shard: DocumentShard, *, held: bool) -> Iterator[tuple[int, Document]]:
        """Yield a shard's documents that are held out, or the others, with their number within their source.

        Documents dropped by the index are skipped. Raises DataError if a document changed or is missing.
        """
        rows = self._document_index.get_source_rows(shard.source)
        place, found = self._reached or (None, iter(()))
        self._reached = None
        if place != (shard.source, shard.first):
            found = self._iter_source_documents(shard, str(self._document_index.names[rows[shard.first]]))
        for number in range(shard.first, shard.stop):
            wanted = self._document_index.hashes[rows[number]].tobytes()
            document = next((each for each in found if each.content_digest == wanted), None)
            if document is None:
                raise _build_changed_error(
                    str(self._document_index.names[rows[number]]), self._sources[shard.source].path
                )
            if self._document_index.held[rows[number]] == held:
                yield number, document
        self._reached = ((shard.source, shard.stop), found)

    def _iter_source_documents(self, shard: DocumentShard, begin: str) -> Iterator[Document]:
        index = shard.source
        return keep_duplicates(
            self._sources[index],
            index,
            self._files(index),
            on_error=self._data.on_error,
            tally=DocumentStats(),
            evaluation=self._collect_evaluation_hashes() if self._is_repository_source(index) else (),
            begin=begin if shard.first else "",
        )

    def _is_repository_source(self, index: int) -> bool:
        return self._sources[index].group_by == "repository" and index < len(self._data.sources)

    def _collect_evaluation_hashes(self) -> set[bytes]:
        """Collect the content hashes that are excluded from training repositories."""
        given = range(len(self._data.sources), len(self._sources))
        read = (read_source_documents(self._sources[index], index, on_error=self._data.on_error) for index in given)
        return {found for document in chain.from_iterable(read) for found in iter_content_hashes(document)}


def _read_all_documents(data: DataConfig, tallies: list[DocumentStats], signer: SignatureRunner) -> Iterator[Document]:
    """Yield every document: those of the evaluation first, then those for training."""
    seen: set[bytes] = set()
    evaluation: set[bytes] = set()
    sources = list_all_sources(data)
    with DocumentCleaner(data, signer) as cleaner:
        for index in (*range(len(data.sources), len(sources)), *range(len(data.sources))):
            is_training = index < len(data.sources)
            found = read_source_documents(
                sources[index],
                index,
                on_error="collect",
                tally=tallies[index],
                seen=seen,
                evaluation=evaluation if is_training else (),
                find_faults=cleaner.find_faults if is_training else cleaner.keep_documents,
            )
            for document in found:
                if not is_training:
                    evaluation.update(iter_content_hashes(document))
                yield document


def _compute_split_hash(document: Document, by: Literal["document", "repository"]) -> int:
    """Return 64 bits of the content's or the repository name's hash; they decide if a document is held out."""
    of_repository = by == "repository" and document.repository
    return int.from_bytes((content_hash(document.repository) if of_repository else document.content_digest)[:8], "big")


def _check_documents_left(sources: tuple[SourceConfig, ...], documents_left: int, key: str) -> None:
    if sources and not documents_left:
        paths = ", ".join(redact_uri(source.path) for source in sources)
        raise DataError(
            f"data.{key}: no document is left ({paths} hold only empty, doubled "
            "or unreadable ones). Give files with text in them."
        )


def _build_changed_error(name: str, path: str) -> DataError:
    return DataError(
        f"{path}: {name} changed while the data was being prepared, or since. Let nothing write into the sources, and "
        "prepare again."
    )
