"""Sources with weights: their shares of the tokens, each through epochs of its own, every token once in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare import shards as shards_module
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import PreparedDataset
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError

Configure = Callable[..., Config]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(f'{{"text": "{"word " * (i % 9 + 3)}{i}"}}' for i in range(60)), encoding="utf-8")
    return path


def mixed(corpus: Path, words: Path, *weights: float, **code: Any) -> list[dict[str, Any]]:
    return [
        {"path": str(corpus), "format": "code", "weight": weights[0], **code},
        {"path": str(words), "format": "text", "weight": weights[1]},
    ]


def tokens_seen(prepared: PreparedDataset, steps: int, global_batch: int) -> Counter[int]:
    sequences, seen = PackedDataset(prepared.dataset_info, global_batch=global_batch), Counter[int]()
    for step in range(steps):
        for row in sequences.get_document_spans(step):
            for piece in row:
                seen[piece.source] += piece.tokens
    return seen


@pytest.mark.parametrize("weights", [(3, 1), (0.5, 0.5), (0.1, 0.9)])
def test_weights_are_shares_of_tokens(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path, weights: tuple[float, float]
) -> None:
    prepared = prepare_dataset(configure(sources=mixed(corpus, words, *weights)), markers, epochs=[4, 8])
    seen = tokens_seen(prepared, 20, 4)
    assert seen[0] / seen.total() == pytest.approx(weights[0] / sum(weights), abs=0.02)


def test_each_source_runs_through_epochs_of_its_own(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path
) -> None:
    config = configure(sources=mixed(corpus, words, 1, 1, fim={"rate": 0.5}))
    prepared = prepare_dataset(config, markers, epochs=[2, 5])
    dataset_info = prepared.dataset_info
    code, text = dataset_info.streams
    assert (len(code.epochs), len(text.epochs)) == (2, 5)
    assert len({epoch.tokens for epoch in code.epochs}) == 2  # fill-in-the-middle is drawn anew, text is not
    assert len({epoch.tokens for epoch in text.epochs}) == 1
    sequences, found = PackedDataset(dataset_info, global_batch=1), Counter[tuple[int, int, int]]()
    step = 0
    while True:
        try:
            placed = sequences.get_step_sequences(step)[0]
        except DataError:
            break
        assert sequences.count_loss_tokens(step) == sum(
            int((batch.labels != -100).sum()) for batch in sequences.get_micro_batches(step, range(1), 1)
        )
        for piece in sequences.get_document_spans(step)[0]:
            assert piece.source == placed.stream
            found[placed.stream, placed.epoch, piece.document] += piece.tokens
        step += 1
    for stream, epoch in {(stream, epoch) for stream, epoch, _ in found}:
        files = dataset_info.streams[stream].epochs[epoch]
        examples, expected = ExampleStore(prepared.directory / files.tokens), Counter[int]()
        for document, length in zip(examples.document.tolist(), examples.length.tolist(), strict=True):
            expected[document] += length
        whole = {document: tokens for (s, e, document), tokens in found.items() if (s, e) == (stream, epoch)}
        last = max(e for s, e, _ in found if s == stream)
        assert whole == expected if epoch < last else all(tokens <= expected[d] for d, tokens in whole.items())


def test_more_epochs_change_nothing_of_what_was_seen(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path
) -> None:
    config = configure(sources=mixed(corpus, words, 2, 1))
    few, many = (
        PackedDataset(prepare_dataset(config, markers, epochs=n).dataset_info, global_batch=3) for n in ([1, 1], [3, 3])
    )
    steps = 0
    while True:
        try:
            row = few.get_document_spans(steps)
        except DataError as error:
            assert "of epoch 1 of" in str(error)  # noqa: PT017 - the step it comes at is what is looked for
            break
        assert row == many.get_document_spans(steps)
        steps += 1
    assert steps > 2


def test_other_weights_render_nothing_again(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_dataset(configure(sources=mixed(corpus, words, 2, 1)), markers)
    monkeypatch.setattr(shards_module, "ShardWriter", None)
    second = prepare_dataset(configure(sources=mixed(corpus, words, 1, 2)), markers)
    assert second.directory == first.directory
    assert [stream.epochs for stream in second.dataset_info.streams] == [
        stream.epochs for stream in first.dataset_info.streams
    ]
    assert second.dataset_info.streams != first.dataset_info.streams


def test_a_source_that_gives_nothing_is_named(
    configure: Configure, markers: TokenizationSpec, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("long " * 300, encoding="utf-8")
    sources = mixed(corpus, tmp_path / "long.txt", 1, 1)
    sources[1]["overlong"] = "drop"
    with pytest.raises(DataError, match=r"no document of .*long\.txt is left to train on"):
        prepare_dataset(configure(sources=sources, eval={"fraction": 0.0}), markers)


def test_hundreds_of_epochs_are_prepared_and_read_with_few_open_files(
    configure: Configure, markers: TokenizationSpec, corpus: Path, words: Path
) -> None:
    prepared = prepare_dataset(configure(sources=mixed(corpus, words, 1, 20)), markers, epochs=[2, 120])
    sequences = PackedDataset(prepared.dataset_info, global_batch=4)
    opened, step = [], 0
    while sequences.has_step(step):
        sequences.get_micro_batches(step, range(4), 4)
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
        step += 1
    assert step > 100
    assert max(opened) - min(opened) < 40
