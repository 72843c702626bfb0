"""Preparing: complete, accounted for, found again, and safe when two do it at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, PreparedDataset
from llm_training_toolkit.data.prepare.document_index import DocumentIndex
from llm_training_toolkit.data.prepare.packing import PackingPlan
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError

Configure = Callable[..., Config]


def texts_of(prepared: PreparedDataset, part: str, encoder: TextEncoder) -> list[str]:
    """The documents a rendering holds, put together from their examples."""
    examples = ExampleStore(prepared.directory / part)
    texts: dict[int, str] = {}
    for i in range(len(examples)):
        example = examples[i]
        texts[example.document] = texts.get(example.document, "") + encoder.decode(example.tokens)
    return list(texts.values())


def test_every_document_is_there_once_on_its_side(
    configure: Configure, markers: TokenizationSpec, corpus: Path, encoder: TextEncoder
) -> None:
    prepared = prepare_dataset(configure(), markers, epochs=[2])
    trained, held = (texts_of(prepared, part, encoder) for part in ("tokens", "held_out"))
    written = [path.read_text(encoding="utf-8") + "<|endoftext|>" for path in sorted(corpus.iterdir())]
    assert sorted(trained + held) == sorted(written)
    dataset_info = prepared.dataset_info
    (source,) = dataset_info.sources
    assert (source.documents, source.held_out) == (41, len(held))
    assert held
    assert dataset_info.tokens_lost == 0
    assert (
        dataset_info.streams[0].sequences_per_epoch[0]
        == dataset_info.streams[0].sequences_per_epoch[1]
        == len(PackingPlan.read(prepared.directory / "plan-seed1-epoch0"))
    )
    assert source.tokens == sum(len(encoder.encode(text.removesuffix("<|endoftext|>"))) + 1 for text in trained)
    assert dataset_info.padding == pytest.approx(
        1 - source.tokens / (64 * dataset_info.streams[0].sequences_per_epoch[0])
    )
    longest = max(written, key=lambda text: len(encoder.encode(text.removesuffix("<|endoftext|>"))))
    assert source.longest == len(encoder.encode(longest.removesuffix("<|endoftext|>"))) + 1 > 10 * 64
    assert (corpus / source.longest_document).read_text(encoding="utf-8") + "<|endoftext|>" == longest
    assert source.truncated == 0.0
    assert [epoch.tokens for epoch in dataset_info.streams[0].epochs] == ["tokens", "tokens"]


def test_the_second_call_finds_everything(
    configure: Configure, markers: TokenizationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_dataset(configure(), markers)
    monkeypatch.setattr("llm_training_toolkit.data.prepare.shards.ShardWriter", None)
    monkeypatch.setattr("llm_training_toolkit.data.prepare.shards.open_tokenizer", None)
    assert prepare_dataset(configure(), markers) == first


def test_dataset_info_alone_opens_the_data(configure: Configure, markers: TokenizationSpec) -> None:
    prepared = prepare_dataset(configure(), markers)
    dataset_info = DatasetInfo.from_json(prepared.dataset_info.to_json())
    assert dataset_info == prepared.dataset_info
    assert PreparedDataset.from_info(dataset_info) == prepared
    (prepared.directory / "tokens").rename(prepared.directory / "gone")
    with pytest.raises(DataError, match="ltt prepare"):
        PreparedDataset.from_info(dataset_info)
    with pytest.raises(DataError, match="ltt prepare"):
        DatasetInfo.from_json("{}")


def test_what_changes_the_tokens_changes_the_fingerprint(
    configure: Configure, markers: TokenizationSpec, corpus: Path
) -> None:
    source = {"path": str(corpus), "format": "code"}
    changes: list[dict[str, Any]] = [
        {},
        {"sequence_length": 32},
        {"fim": {"rate": 0.5}},
        {"eval": {"fraction": 0.2}},
        {"sources": [source, {**source, "overlong": "drop"}]},
        {"tokenizer": {"train": {"vocab_size": 512}}},
    ]
    prints = [prepare_dataset(configure(**change), markers).dataset_info.fingerprint for change in changes]
    (corpus / "file00.py").write_text("x = 2\n", encoding="utf-8")
    prints.append(prepare_dataset(configure(), markers).dataset_info.fingerprint)
    assert len(set(prints)) == len(prints)
    assert prepare_dataset(configure(seed=9), markers).dataset_info.fingerprint == prints[-1]


def test_fill_in_the_middle_renders_each_epoch_anew_and_never_the_held_out(
    configure: Configure, markers: TokenizationSpec, encoder: TextEncoder
) -> None:
    prepared = prepare_dataset(configure(fim={"rate": 1.0}), markers, epochs=[2])
    first, second = (texts_of(prepared, epoch.tokens, encoder) for epoch in prepared.dataset_info.streams[0].epochs)
    assert first != second
    assert all("<fim_middle>" in text for text in first)
    assert not any("<fim_middle>" in text for text in texts_of(prepared, "held_out", encoder))
    longer = prepare_dataset(configure(fim={"rate": 1.0}), markers, epochs=[3]).dataset_info
    assert longer.streams[0].epochs[:2] == prepared.dataset_info.streams[0].epochs


def test_a_tokenizer_is_trained_from_the_documents_that_are_not_held_out(
    configure: Configure, markers: TokenizationSpec
) -> None:
    config = configure(tokenizer={"train": {"vocab_size": 600}})
    stages: list[tuple[str, int, int]] = []
    prepared = prepare_dataset(config, markers, progress=lambda *event: stages.append(event))
    assert (prepared.tokenizer_path / "tokenizer.json").is_file()
    assert prepared.tokenizer_path.parent == prepared.directory.parent
    (source,) = prepared.dataset_info.sources
    kept = source.documents - source.held_out
    assert ("tokenizer", kept, kept) in stages
    assert ("tokens", kept, kept) in stages
    other = prepare_dataset(configure(tokenizer={"train": {"vocab_size": 600}}, sequence_length=32), markers)
    assert other.tokenizer_path == prepared.tokenizer_path


def test_a_given_tokenizer_is_copied(configure: Configure, markers: TokenizationSpec, tokenizer_path: Path) -> None:
    prepared = prepare_dataset(configure(), markers)
    copied = prepared.tokenizer_path / "tokenizer.json"
    assert copied.read_bytes() == (tokenizer_path / "tokenizer.json").read_bytes()
    assert prepared.tokenizer_path != tokenizer_path


def test_a_tokenizer_that_lacks_a_sentinel_is_refused_before_anything_is_read(
    configure: Configure, markers: TokenizationSpec, tokenizer_path: Path
) -> None:
    other = replace(markers, tokens=replace(markers.tokens, fim_middle="<mid>"))
    stages: list[tuple[str, int, int]] = []
    with pytest.raises(DataError, match=rf"{tokenizer_path}/tokenizer.json: has no special token '<mid>'"):
        prepare_dataset(configure(fim={"rate": 0.5}), other, progress=lambda *event: stages.append(event))
    assert not stages


def test_dropped_documents_are_counted_by_reason(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path
) -> None:
    path = tmp_path / "x.jsonl"
    lines = ['{"text": "a"}', '{"text": ""}', "{", '{"text": "a"}', '{"text": "%s"}' % ("long " * 99), '{"text": "b"}']
    path.write_text("\n".join(lines), encoding="utf-8")
    source = {"path": str(path), "format": "text", "overlong": "drop"}
    config = configure(sources=[source], on_error="skip", max_skipped=0.5, eval={"fraction": 0.0})
    (dataset_info,) = prepare_dataset(config, markers).dataset_info.sources
    assert dataset_info.dropped == {"empty": 1, "duplicate": 1, "invalid_json": 1, "too_long": 1}
    assert (dataset_info.documents, dataset_info.held_out) == (2, 0)
    assert dataset_info.longest_document == "x.jsonl:5"
    assert dataset_info.truncated == dataset_info.longest / (dataset_info.longest + dataset_info.tokens) > 0.9
    strict = configure(sources=[source], on_error="skip", max_skipped=0.1)
    with pytest.raises(DataError, match="max_skipped"):
        prepare_dataset(strict, markers)
    with pytest.raises(DataError, match=r"x\.jsonl:3"):
        prepare_dataset(configure(sources=[source]), markers)


def test_documents_without_loss_are_counted_apart_from_long_ones(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path
) -> None:
    answers: list[dict[str, Any]] = [{"content": "b"}, {"content": "c", "loss": False}, {"content": "long " * 99}]
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", **answer}] for answer in answers]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), encoding="utf-8")
    source = {"path": str(tmp_path / "x.jsonl"), "format": "chat", "prompt_template": "starcoder"}
    (info,) = prepare_dataset(configure(sources=[source], eval={"fraction": 0.0}), markers).dataset_info.sources
    assert (info.documents, info.dropped) == (1, {"too_long": 1, "no_loss": 1})
    assert info.truncated == info.longest / (info.longest + info.tokens)


@pytest.mark.parametrize(
    ("text", "match"), [("", "no document is left"), ("long " * 200, "or longer than data.sequence_length 64")]
)
def test_nothing_to_train_on_is_an_error(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path, text: str, match: str
) -> None:
    path = tmp_path / "only.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=match):
        prepare_dataset(configure(sources=[{"path": str(path), "format": "text", "overlong": "drop"}]), markers)


def test_two_at_once_do_not_disturb_each_other(configure: Configure, markers: TokenizationSpec) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare_dataset(configure(), markers), range(4)))
    assert all(result == results[0] for result in results)
    cache = results[0].directory.parent
    assert not [path for path in cache.rglob(".*") if path != cache]


def test_documents_that_change_meanwhile_are_noticed(
    configure: Configure, markers: TokenizationSpec, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = DocumentIndex.read

    def then_change(directory: Path) -> DocumentIndex:
        (corpus / "file03.py").write_text("changed = True\n", encoding="utf-8")
        return read(directory)

    monkeypatch.setattr(DocumentIndex, "read", then_change)
    with pytest.raises(DataError, match=r"file03\.py changed"):
        prepare_dataset(configure(), markers)


def test_paths_do_not_depend_on_the_working_directory(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare_dataset(configure(cache="here/cache"), markers)
    assert prepared.directory.parent == (tmp_path / "here" / "cache").resolve()
    monkeypatch.chdir("/")
    assert PreparedDataset.from_info(prepared.dataset_info) == prepared


def test_a_long_corpus_lies_in_several_batches(
    configure: Configure,
    markers: TokenizationSpec,
    encoder: TextEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = texts_of(prepare_dataset(configure(), markers), "tokens", encoder)
    monkeypatch.setattr("llm_training_toolkit.data.prepare.arrow_store._TOKENS_PER_BATCH", 100)
    again = prepare_dataset(configure(cache=str(tmp_path / "other")), markers)
    assert texts_of(again, "tokens", encoder) == whole
    with pa.OSFile(str(again.directory / "tokens" / "tokens-00000.arrow")) as file:
        assert pa.ipc.open_file(file).num_record_batches > 10
