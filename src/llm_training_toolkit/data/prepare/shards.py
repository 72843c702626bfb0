"""Renders documents in shards, each complete or absent on disk: what is done is never done again, anywhere.

A shard is some half a minute of work. `in_this_process` does one after the other; `launch` can spread them over the
CPUs of a cluster, because a job is plain values and whatever it needs lies in the cache.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.config.schema import Data
from llm_training_toolkit.data.prepare.arrow_store import Examples, SourceExample, join_examples, write_examples
from llm_training_toolkit.data.prepare.atomic_dir import complete
from llm_training_toolkit.data.prepare.dataset_info import SourceReceipt
from llm_training_toolkit.data.prepare.document_index import Rereader, Shard, Survey, all_sources
from llm_training_toolkit.data.prepare.renderer import Renderer
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.tokenizer import Markers, open_tokenizer
from llm_training_toolkit.data.types import Rendered

_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 8 << 20

Done = Callable[[int], None]
"""Told how many documents were rendered since it was last told."""


@dataclass(frozen=True)
class Job:
    """What to render: everything but the shard. `place`: the directory that the finished shards are put into."""

    data: Data
    markers: Markers
    seed: int
    epoch: int
    held: bool
    survey: Path
    tokenizer: Path
    place: Path


@dataclass
class Lengths:
    """What is known of the lengths of rendered documents: the longest one's tokens and name, and those left out.

    too_long: how many documents were dropped because they are longer than a sequence; left_out: their tokens.
    """

    longest: int = 0
    name: str = ""
    too_long: int = 0
    left_out: int = 0

    def see(self, name: str, document: Rendered) -> None:
        """Count a document in."""
        dropped = not document.examples
        self.add(Lengths(document.tokens, name, int(dropped), document.tokens * dropped))

    def add(self, other: Lengths) -> None:
        """Count others in; of documents of one length the first is named."""
        if other.longest > self.longest:
            self.longest, self.name = other.longest, other.name
        self.too_long += other.too_long
        self.left_out += other.left_out


Runner = Callable[[Job, Sequence[Shard], Done], None]
"""Sees to it that every shard of a job is in its place."""


def in_this_process(job: Job, shards: Sequence[Shard], done: Done) -> None:
    """Render one shard after the other; the tokenizer uses all cores by itself."""
    writer = ShardWriter(job)
    for shard in shards:
        writer.write(shard, done)


class ShardWriter:
    """Renders shards of one job; what all of them need is opened once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._encoder = open_tokenizer(str(job.tokenizer))
        self._rereader = Rereader(job.data, Survey.read(job.survey))
        sources, length = all_sources(job.data), job.data.sequence_length
        self._renderer = Renderer(sources, job.markers, self._encoder, job.tokenizer, length)

    def write(self, shard: Shard, done: Done) -> None:
        """Render a shard unless it is there. Raises DataError for documents that changed or cannot be rendered."""
        complete(directory_of(self._job, shard), lambda directory: self._render(directory, shard, done))

    def _render(self, directory: Path, shard: Shard, done: Done) -> None:
        lengths, job = Lengths(), self._job

        def rendered() -> Iterator[SourceExample]:
            for batch in _batches(self._rereader.documents(shard, held=job.held)):
                found = self._renderer.render(shard.source, batch, seed=job.seed, epoch=job.epoch, plain=job.held)
                for (_, document), each in zip(batch, found, strict=True):
                    lengths.see(document.name, each)
                    yield from (SourceExample(shard.source, example) for example in each.examples)
                done(len(batch))

        write_examples(directory, rendered())
        facts = {"source": shard.source, "lengths": asdict(lengths)}
        (directory / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def directory_of(job: Job, shard: Shard) -> Path:
    """Where a shard is put."""
    return job.place / f"source{shard.source}-{shard.first}-{shard.stop}"


def join(job: Job, shards: Sequence[Shard], target: Path, sources: int) -> None:
    """Make one rendering of all its shards in `target`: their files are linked or copied, the index is written anew."""
    directories = [directory_of(job, shard) for shard in shards]
    lengths = [Lengths() for _ in range(sources)]
    for directory in directories:
        facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
        lengths[facts["source"]].add(Lengths(**facts["lengths"]))
    join_examples(directories, target, _linked)
    encoder = open_tokenizer(str(job.tokenizer))
    facts = {
        "pad": encoder.id_of(job.markers.tokens.pad),
        "vocab_size": encoder.vocab_size,
        "lengths": [asdict(each) for each in lengths],
    }
    (target / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


@dataclass(frozen=True)
class Facts:
    """What `join` found: the padding token and the size of the vocabulary; the lengths of each source's documents."""

    pad: int
    vocab_size: int
    lengths: tuple[Lengths, ...]


def read_facts(directory: Path) -> Facts:
    """The facts of a rendering."""
    facts = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    return Facts(facts["pad"], facts["vocab_size"], tuple(Lengths(**each) for each in facts["lengths"]))


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _batches(numbered: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Batches of documents, large enough to keep all cores busy and no larger."""
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


class _Rendering(NamedTuple):
    examples: Examples
    facts: Facts

    @classmethod
    def open(cls, directory: Path) -> _Rendering:
        return cls(Examples(directory), read_facts(directory))

    def tokens(self, source: int) -> int:
        return int(self.examples.length[self.examples.source == source].sum())

    def targets(self, source: int) -> int:
        return int(self.examples.targets[self.examples.source == source].sum())


def source_receipts(
    paths: Sequence[str], survey: Survey, first: Sequence[Path], held_out: Path
) -> tuple[SourceReceipt, ...]:
    """The receipts of all sources, by the rendering of each stream's first epoch and that of what is held out.

    first: one directory, or where sources have weights one for each of those that are trained on, in their order.
    """
    held, streams = _Rendering.open(held_out), [_Rendering.open(directory) for directory in first]
    return tuple(
        _source_receipt(path, index, survey, streams[index if index < len(streams) else 0], held)
        for index, path in enumerate(paths)
    )


def _source_receipt(path: str, index: int, survey: Survey, trained: _Rendering, held: _Rendering) -> SourceReceipt:
    lengths = Lengths()
    for side in (trained, held):
        lengths.add(side.facts.lengths[index])
    held_out = survey.count(held=True, source=index) - held.facts.lengths[index].too_long
    kept = survey.count(held=False, source=index) - trained.facts.lengths[index].too_long
    tokens = trained.tokens(index)
    return SourceReceipt(
        path=path,
        documents=kept + held_out,
        held_out=held_out,
        dropped=survey.dropped[index] | ({"too_long": lengths.too_long} if lengths.too_long else {}),
        tokens=tokens,
        loss_tokens=trained.targets(index),
        longest=lengths.longest,
        longest_document=lengths.name,
        truncated=lengths.left_out / max(tokens + held.tokens(index) + lengths.left_out, 1),
    )
