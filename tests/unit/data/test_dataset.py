"""Batches: the order is a function of the step, and a row is what it should be to the last position."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.collate import (
    MicroBatch,
    build_full_batch,
    build_padding_batch,
    collate_rows,
    count_attended_tokens,
)
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, SourceExample, join_examples, write_examples
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo, PreparedDataset, StreamInfo
from llm_training_toolkit.data.prepare.packing import pack_in_windows
from llm_training_toolkit.data.sample_log import SampleLog, read_sample_log
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.models.attention import compute_cu_seqlens
from llm_training_toolkit.plan import compute_replica_slice
from run_results import decode_sequence

Configure = Callable[..., Config]
N = -100


@pytest.fixture
def prepared(configure: Configure, markers: TokenizationSpec) -> PreparedDataset:
    return prepare_dataset(configure(fim={"rate": 0.5, "loss": "middle"}), markers, epochs=[2])


def example(tokens: list[int], loss: list[int]) -> Example:
    return Example(np.array(tokens, dtype=np.uint32), np.array(loss, dtype=np.bool_), 0)


def test_a_row_written_out_by_hand() -> None:
    pieces = [example([7, 8, 9, 0], [1, 1, 0, 1]), example([5], [1]), example([6, 0], [1, 1])]
    batch = collate_rows([pieces, []], 10, pad_id=3)
    assert batch.input_ids.tolist() == [[7, 8, 9, 0, 5, 6, 0, 3, 3, 3], [3] * 10]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 0, 1, 0, 1, 2], list(range(10))]
    assert batch.labels.tolist() == [[8, N, 0, N, N, 0, N, N, N, N], [N] * 10]
    assert {tensor.dtype for tensor in (batch.input_ids, batch.position_ids, batch.labels)} == {torch.int64}
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype) == ([0, 4, 5, 7, 10, 20], torch.int32)
    assert batch.max_seqlen == 10


def test_a_full_row_has_no_padding_and_a_dummy_nothing_else() -> None:
    batch = collate_rows([[example([1, 2], [1, 1]), example([3, 4], [1, 1])]], 4, pad_id=0)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]
    assert batch.labels.tolist() == [[2, N, 4, N]]
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen) == ([0, 2, 4], 2)
    assert build_padding_batch(2, 4, 9).input_ids.tolist() == [[9] * 4] * 2
    assert (build_padding_batch(2, 4, 9).labels == N).all()


@given(st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=4))
def test_the_bounds_of_the_documents_are_those_that_the_positions_show(rows: list[list[int]]) -> None:
    pieces = [[example(list(range(length)), [1] * length) for length in row] for row in rows]
    batch = collate_rows(pieces, 27, pad_id=0)
    bounds, longest = compute_cu_seqlens(batch.position_ids)
    assert torch.equal(bounds, batch.cu_seqlens)
    assert longest == batch.max_seqlen


def stacked(batches: list[MicroBatch]) -> list[tuple[list[int], list[int], list[int]]]:
    return [
        (ids.tolist(), positions.tolist(), labels.tolist())
        for batch in batches
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True)
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(world=st.integers(1, 9), micro=st.integers(1, 5), global_batch=st.integers(1, 12))
def test_a_step_is_the_same_for_any_number_of_ranks(
    prepared: PreparedDataset, world: int, micro: int, global_batch: int
) -> None:
    sequences = PackedDataset(prepared.dataset_info, global_batch=global_batch, epochs=2)
    whole = stacked(sequences.get_micro_batches(1, range(global_batch), global_batch))
    edges = [rank * global_batch // world for rank in range(world + 1)]
    shares = [sequences.get_micro_batches(1, range(edges[rank], edges[rank + 1]), micro) for rank in range(world)]
    assert [row for share in shares for row in stacked(share)] == whole
    assert all(len(batch.input_ids) <= micro for share in shares for batch in share)
    assert sequences.count_loss_tokens(1) == sum(label != N for _, _, labels in whole for label in labels)


def stored(folder: Path, lengths: list[int], seed: int, partitions: int) -> DatasetInfo:
    """Two epochs of documents of these lengths, cut to 16 tokens. Each token says whose it is and which of its."""
    (folder / "tokenizer").mkdir()
    pieces = [
        (number, range(start, min(start + 16, length)))
        for number, length in enumerate(lengths)
        for start in range(0, length, 16)
    ]
    ones = np.ones(16, dtype=np.bool_)
    for partition in range(partitions):
        shard, tokens = folder / f"shard{partition}", folder / f"tokens{partition}"
        shard.mkdir()
        tokens.mkdir()
        write_examples(
            shard,
            [
                SourceExample(
                    0, Example(np.array(places, dtype=np.uint32) + 1000 * number + 1, ones[: len(places)], number)
                )
                for number, places in pieces
                if number % partitions == partition
            ],
        )
        join_examples([shard], tokens, os.link)
    epochs = []
    for part in range(2 * partitions):
        tokens = folder / f"tokens{part % partitions}"
        index = ExampleStore(tokens)
        plan = pack_in_windows(index.batch, index.length, 16, targets=index.targets, seed=seed, epoch=part)
        (folder / f"plan{part}").mkdir()
        plan.write(folder / f"plan{part}")
        epochs.append(EpochInfo(tokens.name, f"plan{part}", len(plan), int(index.length.sum()), 0))
    return DatasetInfo(
        fingerprint="",
        directory=str(folder),
        tokenizer_path=str(folder / "tokenizer"),
        vocab_size=1 << 20,
        pad_id=0,
        sequence_length=16,
        seed=seed,
        sources=(),
        streams=(StreamInfo(1, tuple(epochs), partitions),),
        held_out="tokens0",
        held_out_plan="plan0",
        eval_sequences=0,
        padding=0.0,
        tokens_lost=0,
    )


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(2, 40).filter(lambda length: length % 16 != 1), min_size=1, max_size=30),
    seed=st.integers(0, 99),
    global_batch=st.integers(1, 9),
    micro=st.integers(1, 4),
    partitions=st.integers(1, 4),
    attempts=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 6)), min_size=1, max_size=4),
)
def test_any_documents_any_ranks_any_restarts(
    lengths: list[int], seed: int, global_batch: int, micro: int, partitions: int, attempts: list[tuple[int, int]]
) -> None:
    """Attempts (ranks, steps until they are killed) one after the other see what one undisturbed rank sees."""
    with TemporaryDirectory() as name:
        dataset_info = stored(Path(name), lengths, seed, partitions)
        undisturbed = DataLoader(dataset_info, global_batch=global_batch, epochs=2)
        steps = -(-dataset_info.total_sequences // global_batch)
        alone = [
            undisturbed.get_micro_batches(s, range(undisturbed.count_sequences(s)), global_batch, 1)
            for s in range(steps)
        ]
        seen: list[list[tuple[list[int], list[int], list[int]]]] = []
        for world, until in [*attempts, (attempts[0][0], steps)]:
            origin = (len(seen), min(len(seen) * global_batch, dataset_info.total_sequences))
            dataloader = DataLoader(dataset_info, global_batch=global_batch, epochs=2, origin=origin)
            for step in range(len(seen), min(len(seen) + until, steps)):
                count = dataloader.count_sequences(step)
                most = -(-len(compute_replica_slice(count, world, 0)) // micro)
                shares = []
                for rank in range(world):
                    own = compute_replica_slice(count, world, rank)
                    if rank % 2:
                        dataloader.prefetch(step, own, micro)
                    shares.append(dataloader.get_micro_batches(step, own, micro, most))
                assert {len(share) for share in shares} == {most}
                rows = [row for share in shares for row in stacked(share) if any(label != N for label in row[2])]
                assert dataloader.count_loss_tokens(step) == sum(label != N for row in rows for label in row[2])
                seen.append(rows)
        assert seen == [stacked(batches) for batches in alone]
        tokens = Counter(token for rows in seen for ids, _, _ in rows for token in ids if token)
        assert tokens == {1000 * n + at + 1: 2 for n, length in enumerate(lengths) for at in range(length)}


class PausedDataset(PackedDataset):
    """A dataset on storage that answers only once it is allowed to."""

    def __init__(self, dataset_info: DatasetInfo, allowed: Event) -> None:
        super().__init__(dataset_info, global_batch=4)
        self.allowed = allowed

    def get_micro_batches(self, step: int, positions: range, micro_batch: int) -> list[MicroBatch]:
        assert self.allowed.wait(30)
        return super().get_micro_batches(step, positions, micro_batch)


def test_the_next_step_is_read_while_this_one_computes(prepared: PreparedDataset) -> None:
    allowed = Event()
    dataloader = DataLoader(prepared.dataset_info, global_batch=4, epochs=None)
    dataloader._dataset = PausedDataset(prepared.dataset_info, allowed)
    dataloader.prefetch(1, range(4), 2)  # returns, though the storage does not answer yet
    allowed.set()
    found = dataloader.get_micro_batches(1, range(4), 2, 2)
    assert stacked(found) == stacked(
        PackedDataset(prepared.dataset_info, global_batch=4).get_micro_batches(1, range(4), 2)
    )


def test_a_micro_batch_that_is_only_tried_is_not_in_the_sample_log(prepared: PreparedDataset, tmp_path: Path) -> None:
    log = SampleLog(tmp_path, 1, 0)
    dataloader = DataLoader(prepared.dataset_info, global_batch=4, epochs=None, sample_log=log)
    tried = dataloader.read_micro_batch(0, range(2))
    assert not list(read_sample_log(tmp_path, 1))
    trained = dataloader.get_micro_batches(0, range(4), 2, 2)
    assert stacked([tried]) == stacked(trained[:1])
    assert [step for step, _ in read_sample_log(tmp_path, 1)] == [1]


def test_rows_read_for_another_step_are_not_given(prepared: PreparedDataset) -> None:
    dataset = PackedDataset(prepared.dataset_info, global_batch=4)
    dataloader = DataLoader(prepared.dataset_info, global_batch=4, epochs=None)
    for ahead, positions, rows in [(2, range(4), 2), (1, range(1, 4), 2), (1, range(4), 1)]:
        dataloader.prefetch(ahead, positions, rows)
        found = dataloader.get_micro_batches(1, range(4), 2, 2)
        assert stacked(found) == stacked(dataset.get_micro_batches(1, range(4), 2))


def test_an_error_of_the_storage_comes_out_where_the_rows_are_needed(prepared: PreparedDataset) -> None:
    dataloader = DataLoader(prepared.dataset_info, global_batch=4, epochs=1)
    steps = -(-prepared.dataset_info.streams[0].sequences_per_epoch[0] // 4)
    dataloader.prefetch(steps, range(4), 2)
    with pytest.raises(DataError, match=f"step {steps}: lies outside the run"):
        dataloader.get_micro_batches(steps, range(4), 2, 2)


@pytest.mark.parametrize(("start", "stop", "micro"), [(0, 11, 4), (3, 8, 2), (5, 6, 3)])
def test_a_micro_batch_knows_which_positions_it_holds(
    prepared: PreparedDataset, start: int, stop: int, micro: int
) -> None:
    sequences = PackedDataset(prepared.dataset_info, global_batch=11)
    batches = sequences.get_micro_batches(2, range(start, stop), micro)
    assert {batch.step for batch in batches} == {2}
    held = [batch.first + row for batch in batches for row in range(len(batch.input_ids))]
    assert held == list(range(start, stop))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10, deadline=None)
@given(global_batch=st.integers(1, 40))
def test_the_stream_holds_every_token_of_every_document_once_an_epoch(
    prepared: PreparedDataset, global_batch: int
) -> None:
    dataset_info = prepared.dataset_info
    sequences = PackedDataset(dataset_info, global_batch=global_batch, epochs=2)
    assert sequences.total_steps == -(-dataset_info.total_sequences // global_batch)
    placed = [place for step in range(sequences.total_steps) for place in sequences.get_step_sequences(step)]
    assert placed == [
        (0, epoch, i) for epoch in (0, 1) for i in range(dataset_info.streams[0].sequences_per_epoch[epoch])
    ]
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(sequences.total_steps):
        for place, row in zip(sequences.get_step_sequences(step), sequences.get_document_spans(step), strict=True):
            assert sum(piece.tokens for piece in row) <= dataset_info.sequence_length
            for piece in row:
                seen[place.epoch, piece.document] += piece.tokens
    expected: Counter[tuple[int, int]] = Counter()
    for epoch, files in enumerate(dataset_info.streams[0].epochs):
        examples = ExampleStore(prepared.directory / files.tokens)
        for document, length in zip(examples.document.tolist(), examples.length.tolist(), strict=True):
            expected[epoch, document] += length
    assert seen == expected


def test_tokens_of_an_epoch_are_the_documents_tokens_exactly(prepared: PreparedDataset) -> None:
    sequences = PackedDataset(prepared.dataset_info, global_batch=5, epochs=1)
    pieces = [
        p
        for s in range(sequences.total_steps or 0)
        for i in range(5)
        if i < len(sequences.get_step_sequences(s))
        for p in sequences.read_sequence_examples(s, i)
    ]
    stored = ExampleStore(prepared.directory / prepared.dataset_info.streams[0].epochs[0].tokens)
    assert sorted(p.tokens.tolist() for p in pieces) == sorted(stored[i].tokens.tolist() for i in range(len(stored)))


def test_the_last_step_is_short_and_nothing_comes_after(prepared: PreparedDataset) -> None:
    total = prepared.dataset_info.total_sequences
    sequences = PackedDataset(prepared.dataset_info, global_batch=total - 1, epochs=2)
    assert sequences.total_steps == 2
    assert len(sequences.get_step_sequences(1)) == 1
    assert [len(batch.input_ids) for batch in sequences.get_micro_batches(1, range(total), 4)] == [1]
    assert sequences.get_micro_batches(1, range(1, total), 4) == []
    for step in (2, -1):
        with pytest.raises(DataError, match="from 0 to 1"):
            sequences.get_step_sequences(step)


@pytest.mark.parametrize("epochs", [None, 3])
def test_an_epoch_that_is_not_prepared_is_named(prepared: PreparedDataset, epochs: int | None) -> None:
    total = prepared.dataset_info.total_sequences
    sequences = PackedDataset(prepared.dataset_info, global_batch=total - 1, epochs=epochs)
    assert sequences.total_steps is None
    assert len(sequences.get_step_sequences(0)) == total - 1
    with pytest.raises(DataError, match=r"step 1: needs sequences of epoch 2.*at least 3"):
        sequences.get_step_sequences(1)


def test_a_rerun_of_preparing_gives_the_same_stream(
    configure: Configure, markers: TokenizationSpec, prepared: PreparedDataset, tmp_path: Path
) -> None:
    cache = str(tmp_path / "other")
    again = prepare_dataset(configure(fim={"rate": 0.5, "loss": "middle"}, cache=cache), markers, epochs=[2])
    first, second = (PackedDataset(p.dataset_info, global_batch=6) for p in (prepared, again))
    assert all(
        stacked(first.get_micro_batches(s, range(6), 2)) == stacked(second.get_micro_batches(s, range(6), 2))
        for s in range(4)
    )
    other = prepare_dataset(configure(fim={"rate": 0.5, "loss": "middle"}, seed=2), markers, epochs=[2])
    assert first.get_document_spans(0) != PackedDataset(other.dataset_info, global_batch=6).get_document_spans(0)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (2, 1), (3, 2), (50, 4)])
def test_every_rank_evaluates_its_part_in_the_same_shapes(prepared: PreparedDataset, world: int, micro: int) -> None:
    sequences = PackedDataset(prepared.dataset_info, global_batch=4)
    ranks = [list(sequences.iter_eval_batches(rank, world, micro)) for rank in range(world)]
    shapes = [[tuple(batch.labels.shape) for batch in batches] for batches in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    labels = [int((batch.labels != N).sum()) for batches in ranks for batch in batches]
    assert sum(labels) == sequences.eval_loss_tokens > 0
    rows = [row for batches in ranks for row in stacked(batches) if any(label != N for label in row[2])]
    assert len(rows) == sequences.eval_sequences == prepared.dataset_info.eval_sequences


def test_nothing_held_out_is_nothing_to_evaluate(configure: Configure, markers: TokenizationSpec) -> None:
    sequences = PackedDataset(prepare_dataset(configure(eval={"fraction": 0.0}), markers).dataset_info, global_batch=4)
    assert (sequences.eval_sequences, sequences.eval_loss_tokens) == (0, 0)
    assert list(sequences.iter_eval_batches(0, 2, 4)) == []


def test_a_sequence_as_text_and_where_it_came_from(configure: Configure, markers: TokenizationSpec) -> None:
    sequences = PackedDataset(prepare_dataset(configure(), markers).dataset_info, global_batch=4)
    text, row = decode_sequence(sequences, 2, 1), sequences.get_document_spans(2)[1]
    names = [sequences.get_document_name(piece.source, piece.document) for piece in row]
    for name in names:
        if name != "long.py":
            assert f"value_{int(name[4:6])} = {int(name[4:6]) * 7919}\n" in text
    assert sequences.get_padding_batch(1).input_ids.tolist() == [[4] * 64]


@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 12),
)
def test_attended_tokens_are_those_of_every_document_within_the_window(
    lengths: list[list[int]], window: int | None
) -> None:
    rows = [[example([1] * length, [1] * length) for length in row] for row in lengths]
    batch = collate_rows(rows, 36, pad_id=0)
    pieces = [length for row in lengths for length in (*row, 36 - sum(row))]
    expected = sum(min(length, window or length) for length in pieces for _ in range(length))
    assert count_attended_tokens([batch, batch], window) == 2 * expected


def test_the_largest_micro_batch_has_rows_of_one_document_and_a_loss_everywhere() -> None:
    batch = build_full_batch(collate_rows([[example([7, 8], [1, 0])], []], 4, pad_id=3))
    assert batch.input_ids.tolist() == [[7, 8, 3, 3], [3] * 4]
    assert batch.position_ids.tolist() == [list(range(4))] * 2
    assert (batch.labels >= 0).all()
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype, batch.max_seqlen) == ([0, 4, 8], torch.int32, 4)
