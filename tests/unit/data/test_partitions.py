"""Partitions: training begins with the first one, and what comes later changes nothing of what was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare import document_index
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.builder import DatasetBuilder, prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, PreparedDataset
from llm_training_toolkit.data.prepare.document_index import BLOCKS_PER_PARTITION, DocumentIndex, split_into_shards
from llm_training_toolkit.data.prepare.epochs import prepare_epochs
from llm_training_toolkit.data.prepare.shards import render_in_process, select_shards
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan import compute_replica_slice

Configure = Callable[..., Config]
Pieces = Counter[tuple[int, int, tuple[int, ...]]]
PARTITIONS = 3


def over_steps(config: Config, steps: int) -> Config:
    train = config.train.model_copy(update={"epochs": None, "steps": steps, "global_batch_size": 4})
    return config.model_copy(update={"train": train})


def rendered_pieces(prepared: PreparedDataset, epoch: int) -> Pieces:
    """Every piece of an epoch that was rendered: its source, document and tokens."""
    found: Pieces = Counter()
    for stream in prepared.dataset_info.streams:
        for part in stream.epochs[epoch * stream.partitions :][: stream.partitions]:
            store = ExampleStore(prepared.directory / part.tokens)
            for number in range(len(store)):
                example = store[number]
                found[int(store.source[number]), example.document, tuple(example.tokens.tolist())] += 1
    return found


def first_parts(dataset_info: DatasetInfo, count: int) -> DatasetInfo:
    """The dataset info as it was when so many parts of each stream were prepared."""
    streams = tuple(replace(stream, epochs=stream.epochs[:count]) for stream in dataset_info.streams)
    return replace(dataset_info, streams=streams)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(f'{{"text": "{"word " * (i % 9 + 3)}{i}"}}' for i in range(60)), encoding="utf-8")
    return path


@pytest.mark.parametrize("fim", [None, {"rate": 0.5}])
def test_an_epoch_has_every_piece_of_its_documents_once(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path, fim: dict[str, Any] | None
) -> None:
    whole = prepare_dataset(configure(fim=fim), markers, epochs=[2])
    dealt = prepare_dataset(configure(fim=fim, partitions=PARTITIONS, cache=str(tmp_path / "c")), markers, epochs=[2])
    (stream,) = dealt.dataset_info.streams
    assert len(stream.epochs) == 2 * PARTITIONS
    assert all(part.sequences for part in stream.epochs)
    assert len({part.tokens for part in stream.epochs}) == (2 * PARTITIONS if fim else PARTITIONS)
    assert dealt.dataset_info.sources == whole.dataset_info.sources
    assert dealt.dataset_info.held_out_sequences == whole.dataset_info.held_out_sequences
    assert dealt.dataset_info.fingerprint != whole.dataset_info.fingerprint
    assert dealt.dataset_info.tokens_lost == 0
    dataset = PackedDataset(dealt.dataset_info, global_batch=5, epochs=2)
    seen: list[Pieces] = [Counter(), Counter()]
    placed = []
    for step in range(dataset.total_steps or 0):
        for position, place in enumerate(dataset.get_step_sequences(step)):
            placed.append(place)
            spans = dataset.get_document_spans(step, range(position, position + 1))[0]
            for span, example in zip(spans, dataset.read_sequence_examples(step, position), strict=True):
                seen[place.epoch][span.source, span.document, tuple(example.tokens.tolist())] += 1
    assert placed == [(0, epoch, n) for epoch in (0, 1) for n in range(stream.sequences_per_epoch[epoch])]
    assert seen == [rendered_pieces(whole, 0), rendered_pieces(whole, 1)]


def test_a_step_is_the_same_whatever_is_prepared_after_it(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path
) -> None:
    sources = [
        {"path": str(corpus), "format": "code", "weight": 2.0, "fim": {"rate": 0.5}},
        {"path": str(words), "format": "text", "weight": 1.0},
    ]
    prepared = prepare_dataset(configure(sources=sources, partitions=PARTITIONS), markers, epochs=[2, 2])
    dataset_info = prepared.dataset_info
    assert rendered_pieces(prepared, 1).keys() != rendered_pieces(prepared, 0).keys()  # drawn anew

    @settings(max_examples=40, deadline=None)
    @given(
        parts=st.integers(1, 2 * PARTITIONS),
        global_batch=st.integers(1, 9),
        ranks=st.integers(1, 4),
        at=st.floats(0, 1, exclude_max=True),
    )
    def check(parts: int, global_batch: int, ranks: int, at: float) -> None:
        early = PackedDataset(first_parts(dataset_info, parts), global_batch=global_batch)
        late = PackedDataset(dataset_info, global_batch=global_batch)
        steps = 0
        while early.has_step(steps):
            steps += 1
        if not steps:
            return
        step = int(at * steps)
        resumed = PackedDataset(dataset_info, global_batch=global_batch, origin=(step, step * global_batch))
        wanted = late.get_micro_batches(step, range(global_batch), 1)
        slices = [compute_replica_slice(global_batch, ranks, rank) for rank in range(ranks)]
        shared = [batch for own in slices for batch in resumed.get_micro_batches(step, own, 1)]
        for found in (early.get_micro_batches(step, range(global_batch), 1), shared):
            assert [batch.input_ids.tolist() for batch in found] == [batch.input_ids.tolist() for batch in wanted]
        labels = sum(int((batch.labels != -100).sum()) for batch in wanted)
        assert early.count_loss_tokens(step) == late.count_loss_tokens(step) == labels
        with pytest.raises(DataError, match=r"needs sequences of .*epoch"):
            early.get_step_sequences(steps)

    check()


@settings(max_examples=50)
@given(
    documents=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400), st.booleans()), min_size=1, max_size=60),
    partitions=st.integers(2, 7),
)
def test_documents_are_dealt_once_in_about_equal_parts(documents: list[tuple[int, int, bool]], partitions: int) -> None:
    documents.sort(key=lambda document: document[0])
    sources, characters, held = (np.array(column) for column in zip(*documents, strict=True))
    index = DocumentIndex(sources, np.zeros((len(held), 16), np.uint8), characters, held, [], [], [])
    data = DataConfig.model_validate({"sequence_length": 64, "sources": [{"path": "x", "format": "text"}] * 3})
    shards = split_into_shards(data, index, range(3), held=False, partitions=partitions)
    dealt = [select_shards(data, index, range(3), number, partitions) for number in range(partitions)]
    assert sorted(shard for part in dealt for shard in part) == shards
    assert sum(index.count_shard_documents(part, held=False) for part in dealt) == np.count_nonzero(~held)
    sizes = index.sum_by_shard(np.where(held, 0, characters), shards)
    largest = max(sizes.max(initial=0), sizes.sum() / (partitions * BLOCKS_PER_PARTITION))
    for part in dealt:
        text = int(index.sum_by_shard(np.where(held, 0, characters), part).sum())
        assert abs(text - sizes.sum() / partitions) <= largest


def test_a_partition_has_the_share_of_every_source_and_is_read_in_a_few_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(document_index, "_CHARACTERS_PER_SHARD", 100)
    sources = np.repeat([0, 1, 2], [20_000, 6_000, 40])
    index = DocumentIndex(
        sources,
        np.zeros((len(sources), 16), np.uint8),
        np.full(len(sources), 10),
        np.zeros(len(sources), np.bool_),
        [],
        [],
        [],
    )
    data = DataConfig.model_validate({"sequence_length": 64, "sources": [{"path": "x", "format": "text"}] * 3})
    dealt = [select_shards(data, index, range(3), number, 5) for number in range(5)]
    assert sum(len(part) for part in dealt) == len(split_into_shards(data, index, range(3), held=False, partitions=5))
    for part in dealt:
        assert part == sorted(part)
        texts = [sum(shard.stop - shard.first for shard in part if shard.source == source) for source in (0, 1)]
        assert texts[0] / sum(texts) == pytest.approx(20 / 26, abs=0.1)
        pieces = 1 + sum(now[:2] != (before.source, before.stop) for before, now in pairwise(part))
        assert pieces <= BLOCKS_PER_PARTITION + 3


def test_training_begins_with_the_first_part_and_the_rest_follows(
    configure: Configure, markers: TokenizationSpec
) -> None:
    config = over_steps(configure(partitions=PARTITIONS), steps=60)

    def build() -> DatasetBuilder:
        return DatasetBuilder(config, markers, None, render_in_process)

    first = prepare_epochs(build(), config, until=1).dataset_info
    assert [len(stream.epochs) for stream in first.streams] == [1]
    assert len(list(Path(first.directory).glob("tokens-partition*"))) == 1
    assert first.held_out_sequences > 0  # held-out documents are complete
    more = prepare_epochs(build(), config, step=10, sequences=40, until=first.total_sequences // 4 + 1).dataset_info
    assert [len(stream.epochs) for stream in more.streams] == [2]
    everything = prepare_epochs(build(), config).dataset_info
    assert everything.total_sequences >= 60 * 4
    for earlier in (first, more):
        assert everything.streams[0].epochs[: len(earlier.streams[0].epochs)] == earlier.streams[0].epochs
    assert everything.held_out_plan == first.held_out_plan
    with pytest.raises(DataError, match=r"partition \d of epoch 0, and only 1 partition "):
        PackedDataset(first, global_batch=4).get_step_sequences(first.total_sequences // 4)


def test_seeds_share_the_tokens_and_each_epoch_has_an_order_of_its_own(
    configure: Configure, markers: TokenizationSpec
) -> None:
    orders = []
    for seed in range(6):
        prepared = prepare_dataset(configure(partitions=PARTITIONS, seed=seed), markers, epochs=[2])
        tokens = [part.tokens for part in prepared.dataset_info.streams[0].epochs]
        assert len(list(prepared.directory.glob("tokens*"))) == PARTITIONS
        for epoch in (0, 1):
            orders.append(tuple(tokens[epoch * PARTITIONS :][:PARTITIONS]))
            assert sorted(orders[-1]) == [f"tokens-partition{number}" for number in range(PARTITIONS)]
    assert len(set(orders)) > 3


def test_a_source_with_fewer_documents_than_partitions_is_read_through(
    configure: Configure, markers: TokenizationSpec, corpus: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "one short text"}\n{"text": "and another one"}\n', encoding="utf-8")
    sources = [
        {"path": str(corpus), "format": "code", "weight": 3.0},
        {"path": str(few), "format": "text", "weight": 1.0},
    ]
    config = over_steps(configure(sources=sources, partitions=8, eval={"fraction": 0.0}), steps=5)
    builder = DatasetBuilder(config, markers, None, render_in_process)
    prepared = prepare_epochs(builder, config)
    assert sum(prepared.dataset_info.streams[1].sequences_per_part[:8]) == 2
    dataset = PackedDataset(prepared.dataset_info, global_batch=4)
    seen = [place for step in range(5) for place in dataset.get_step_sequences(step)]
    assert len(set(seen)) == len(seen) == 20
    assert {place.stream for place in seen} == {0, 1}


def test_a_builder_of_large_files_suggests_partitions(
    configure: Configure, markers: TokenizationSpec, corpus: Path
) -> None:
    with (corpus / "sparse.py").open("wb") as file:
        file.truncate(9 << 30)
    builder = DatasetBuilder(over_steps(configure(), 5), markers, None, render_in_process)
    assert builder.partitions == 1
    assert "data.partitions: 4" in str(builder.partition_note)
    assert DatasetBuilder(configure(), markers, None, render_in_process).partition_note is None  # over epochs
