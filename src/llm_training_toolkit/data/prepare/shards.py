"""Rendering of documents in shards, each complete or absent on disk, so that finished work is never repeated.

A shard takes about half a minute. `render_in_process` renders them one after another; `launch.ray.data_prep` spreads
them over a cluster's CPUs, because a RenderJob holds plain values and its inputs lie in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, SourceExample, join_examples, write_examples
from llm_training_toolkit.data.prepare.atomic_dir import build_atomic_dir
from llm_training_toolkit.data.prepare.dataset_info import SourceInfo
from llm_training_toolkit.data.prepare.dataset_tokenizer import StageProgressCallback
from llm_training_toolkit.data.prepare.document_index import (
    BLOCKS_PER_PARTITION,
    DocumentIndex,
    DocumentReader,
    DocumentShard,
    list_all_sources,
    split_into_shards,
)
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer
from llm_training_toolkit.data.types import RenderedDocument

_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 8 << 20

DoneCallback = Callable[[int], None]  # called with the number of documents rendered since the last call


def build_progress_counter(progress: StageProgressCallback, stage: str, total: int) -> DoneCallback:
    """Build a callback that sums document counts, capped at `total`."""
    seen = 0

    def report_done(more: int) -> None:
        nonlocal seen
        seen += more
        progress(stage, min(seen, total), total)

    return report_done


@dataclass(frozen=True)
class RenderJob:
    """Inputs of rendering, except the shard. shards_directory: directory for the finished shards."""

    data: DataConfig
    markers: TokenizationSpec
    seed: int
    epoch: int
    held: bool
    document_index: Path
    tokenizer: Path
    shards_directory: Path


@dataclass
class LengthStats:
    """Lengths of rendered documents: tokens and name of the longest one.

    too_long: documents dropped because they are longer than a sequence; left_out: their tokens.
    no_loss: documents dropped because none of their tokens bears loss.
    """

    longest: int = 0
    name: str = ""
    too_long: int = 0
    left_out: int = 0
    no_loss: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """Number of dropped documents by reason."""
        counts = {"too_long": self.too_long, "no_loss": self.no_loss}
        return {reason: count for reason, count in counts.items() if count}

    def add_document(self, name: str, document: RenderedDocument) -> None:
        """Count a document."""
        too_long = document.dropped == "too_long"
        no_loss = document.dropped == "no_loss"
        self.merge_stats(LengthStats(document.tokens, name, int(too_long), document.tokens * too_long, int(no_loss)))

    def merge_stats(self, other: LengthStats) -> None:
        """Merge other statistics; of documents of equal length the first is named."""
        if other.longest > self.longest:
            self.longest, self.name = other.longest, other.name
        self.too_long += other.too_long
        self.left_out += other.left_out
        self.no_loss += other.no_loss


class _ShardBlock(NamedTuple):
    """Consecutive shards of a source, dealt together; `characters` of their training documents."""

    shards: tuple[DocumentShard, ...]
    characters: int


def select_shards(
    data: DataConfig, document_index: DocumentIndex, sources: Sequence[int], partition: int, partitions: int
) -> list[DocumentShard]:
    """Return the shards of one partition of the training documents, in their order.

    Blocks of shards are dealt, not documents: a partition is read in large pieces, and most of its shards begin where
    the one before ended. A hash of the documents would have every partition read all files.
    """
    shards = split_into_shards(data, document_index, sources, held=False, partitions=partitions)
    if partitions == 1 or not shards:
        return shards
    sizes = document_index.sum_by_shard(np.where(document_index.held, 0, document_index.characters), shards)
    blocks = _order_blocks(_group_shards(shards, sizes.tolist(), sizes.sum() / (partitions * BLOCKS_PER_PARTITION)))
    characters = np.array([block.characters for block in blocks])
    middles = np.cumsum(characters) - characters / 2
    numbers = np.flatnonzero((middles * partitions // characters.sum()).astype(np.int64) == partition)
    chosen = {shard for number in numbers for shard in blocks[number].shards}
    return [shard for shard in shards if shard in chosen]


def _group_shards(shards: Sequence[DocumentShard], sizes: Sequence[int], limit: float) -> list[_ShardBlock]:
    """Group consecutive shards of a source into blocks of at most `limit` characters, or one shard."""
    blocks: list[_ShardBlock] = []
    for shard, size in zip(shards, sizes, strict=True):
        last = blocks[-1] if blocks else None
        if last is not None and last.shards[0].source == shard.source and last.characters + size <= limit:
            blocks[-1] = _ShardBlock((*last.shards, shard), last.characters + size)
        else:
            blocks.append(_ShardBlock((shard,), size))
    return blocks


def _order_blocks(blocks: Sequence[_ShardBlock]) -> list[_ShardBlock]:
    """Order blocks so that any stretch of them has the share of each source, whose own blocks follow a hash."""
    by_source: dict[int, list[_ShardBlock]] = {}
    for block in blocks:
        by_source.setdefault(block.shards[0].source, []).append(block)
    placed: list[tuple[float, _ShardBlock]] = []
    for source, own in by_source.items():
        own.sort(key=lambda block: _hash_fraction(f"{block.shards[0].source}/{block.shards[0].first}"))
        total, before = sum(block.characters for block in own), 0
        begin = _hash_fraction(f"{source}")  # or small sources would all be in the middle
        for block in own:
            placed.append(((begin + (before + block.characters / 2) / total) % 1.0, block))
            before += block.characters
    return [block for _, block in sorted(placed)]


def _hash_fraction(text: str) -> float:
    """Return a number from 0 to 1."""
    return float(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")) / float(1 << 48)


ShardRunner = Callable[[RenderJob, Sequence[DocumentShard], DoneCallback], None]  # renders missing shards of a job


def render_in_process(job: RenderJob, shards: Sequence[DocumentShard], done: DoneCallback) -> None:
    """Render one shard after another; the tokenizer uses all cores by itself."""
    writer = ShardWriter(job)
    for shard in shards:
        writer.write_shard(shard, done)


class ShardWriter:
    """Renders shards of one job; their common inputs are opened once."""

    def __init__(self, job: RenderJob) -> None:
        self._job = job
        self._encoder = open_tokenizer(str(job.tokenizer))
        self._document_reader = DocumentReader(job.data, DocumentIndex.read(job.document_index))
        sources, length = list_all_sources(job.data), job.data.sequence_length
        self._renderer = DocumentRenderer(sources, job.markers, self._encoder, job.tokenizer, length)

    def write_shard(self, shard: DocumentShard, done: DoneCallback) -> None:
        """Render a shard unless it exists. Raises DataError for documents that changed or cannot be rendered."""
        build_atomic_dir(
            get_shard_directory(self._job, shard), lambda directory: self._render_shard(directory, shard, done)
        )

    def _render_shard(self, directory: Path, shard: DocumentShard, done: DoneCallback) -> None:
        lengths, job = LengthStats(), self._job

        def iter_examples() -> Iterator[SourceExample]:
            for batch in _batch_documents(self._document_reader.read_documents(shard, held=job.held)):
                found = self._renderer.render_documents(
                    shard.source, batch, seed=job.seed, epoch=job.epoch, plain=job.held
                )
                for (_, document), each in zip(batch, found, strict=True):
                    lengths.add_document(document.name, each)
                    yield from (SourceExample(shard.source, example) for example in each.examples)
                done(len(batch))

        write_examples(directory, iter_examples())
        stats = {"source": shard.source, "lengths": asdict(lengths)}
        (directory / "facts.json").write_text(json.dumps(stats), encoding="utf-8")


def get_shard_directory(job: RenderJob, shard: DocumentShard) -> Path:
    """Return the directory of a shard."""
    return job.shards_directory / f"source{shard.source}-{shard.first}-{shard.stop}"


def join_shards(job: RenderJob, shards: Sequence[DocumentShard], target: Path, sources: int) -> None:
    """Join all shards of a job in `target`: token files are linked or copied, the index is rewritten."""
    directories = [get_shard_directory(job, shard) for shard in shards]
    lengths = [LengthStats() for _ in range(sources)]
    for directory in directories:
        stats = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        lengths[stats["source"]].merge_stats(LengthStats(**stats["lengths"]))
    join_examples(directories, target, _link_or_copy)
    encoder = open_tokenizer(str(job.tokenizer))
    stats = {
        "pad": encoder.get_special_token_id(job.markers.tokens.pad),
        "vocab_size": encoder.vocab_size,
        "lengths": [asdict(each) for each in lengths],
    }
    (target / "facts.json").write_text(json.dumps(stats), encoding="utf-8")


@dataclass(frozen=True)
class RenderingStats:
    """Facts that `join_shards` writes: id of the padding token, vocabulary size, and lengths per source."""

    pad: int
    vocab_size: int
    lengths: tuple[LengthStats, ...]


def read_rendering_stats(directory: Path) -> RenderingStats:
    """Read the facts of a rendering."""
    stats = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    return RenderingStats(stats["pad"], stats["vocab_size"], tuple(LengthStats(**each) for each in stats["lengths"]))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _batch_documents(numbered: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Batch documents, just enough at a time to keep all cores busy."""
    batch: list[tuple[int, Document]] = []
    characters = 0
    for item in numbered:
        batch.append(item)
        characters += len(item[1].text)
        if len(batch) == _DOCUMENTS_PER_BATCH or characters > _CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class _RenderedCounts:
    """Sums over renderings, one entry for each source: tokens, tokens with loss, and lengths."""

    tokens: NDArray[np.int64]
    loss_tokens: NDArray[np.int64]
    lengths: list[LengthStats]

    @classmethod
    def read(cls, directories: Sequence[Path], sources: int) -> _RenderedCounts:
        tokens, loss_tokens = np.zeros(sources, np.int64), np.zeros(sources, np.int64)
        lengths = [LengthStats() for _ in range(sources)]
        for directory in directories:
            examples = ExampleStore(directory)
            np.add.at(tokens, examples.source, examples.length)
            np.add.at(loss_tokens, examples.source, examples.targets)
            for total, more in zip(lengths, read_rendering_stats(directory).lengths, strict=True):
                total.merge_stats(more)
        return cls(tokens, loss_tokens, lengths)

    def count_dropped(self, source: int) -> int:
        return sum(self.lengths[source].dropped.values())


def build_source_infos(
    paths: Sequence[str], document_index: DocumentIndex, first: Sequence[Sequence[Path]], held_out: Path
) -> tuple[SourceInfo, ...]:
    """Build all SourceInfos from the renderings of each stream's first epoch and of the held-out documents.

    first: the prepared partitions of one stream, or, if sources have weights, of one per training source, in their
    order.
    """
    held = _RenderedCounts.read([held_out], len(paths))
    streams = [_RenderedCounts.read(directories, len(paths)) for directories in first]
    return tuple(
        _build_source_info(path, index, document_index, streams[index if index < len(streams) else 0], held)
        for index, path in enumerate(paths)
    )


def _build_source_info(
    path: str, index: int, document_index: DocumentIndex, trained: _RenderedCounts, held: _RenderedCounts
) -> SourceInfo:
    lengths = LengthStats()
    for side in (trained, held):
        lengths.merge_stats(side.lengths[index])
    held_out = document_index.count_documents(held=True, source=index) - held.count_dropped(index)
    kept = document_index.count_documents(held=False, source=index) - trained.count_dropped(index)
    tokens = int(trained.tokens[index])
    return SourceInfo(
        path=path,
        documents=kept + held_out,
        held_out=held_out,
        dropped=document_index.dropped[index] | lengths.dropped,
        tokens=tokens,
        loss_tokens=int(trained.loss_tokens[index]),
        longest=lengths.longest,
        longest_document=lengths.name,
        truncated=lengths.left_out / max(tokens + int(held.tokens[index]) + lengths.left_out, 1),
        cut=document_index.cut[index],
    )
