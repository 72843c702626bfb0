"""The survey: what is held out, by document, by repository or by files of one's own; and what it costs to know."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from llm_training_toolkit.config import Config, EvalConfig
from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, read_column
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import PreparedDataset
from llm_training_toolkit.data.prepare.document_index import (
    DocumentIndex,
    DocumentReader,
    build_document_index,
    list_all_sources,
    select_held_out,
    split_into_shards,
    verify_document_index,
)
from llm_training_toolkit.data.sources import read_source_documents
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec
from llm_training_toolkit.errors import DataError
from record_sets import write_json_lines

Configure = Callable[..., Config]


def data(*paths: Path, form: str = "code", **more: Any) -> DataConfig:
    sources = [{"path": str(path), "format": form} for path in paths]
    return DataConfig.model_validate({"sequence_length": 64, "sources": sources, **more})


def document_index(of: DataConfig, folder: Path) -> DocumentIndex:
    folder.mkdir(exist_ok=True)
    build_document_index(of, folder, lambda _done: None)
    return DocumentIndex.read(folder)


def texts(of: DataConfig, document_index: DocumentIndex, *, held: bool) -> list[str]:
    numbers = range(len(list_all_sources(of)))
    order = [*numbers[len(of.sources) :], *numbers[: len(of.sources)]]  # the evaluation's own come first
    chosen, reader = split_into_shards(of, document_index, order, held=held), DocumentReader(of, document_index)
    return [document.text for shard in chosen for _, document in reader.read_documents(shard, held=held)]


def held_out(places: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    return select_held_out(places, np.full(len(places), 100), fraction)


def test_held_out_places_lie_below_the_fraction_and_are_never_none_or_all() -> None:
    places = np.random.default_rng(0).integers(0, 1 << 64, 2000, dtype=np.uint64)
    held = held_out(places, 0.1)
    assert 150 < held.sum() < 250
    assert (held_out(places[:1000], 0.1) == held[:1000]).all()
    assert held_out(places[:3], 1e-9).sum() == 1
    assert held_out(places[:3], 1 - 1e-9).sum() == 2
    assert held_out(np.repeat(places[:3], 4), 1e-9).sum() == 4  # equal places stay together
    assert not held_out(places[:1], 0.5).any()
    assert not held_out(places, 0.0).any()
    assert len(held_out(places[:0], 0.5)) == 0


@given(st.integers(0, 2**32), st.sampled_from([0.01, 0.1, 0.5]))
def test_the_fraction_is_one_of_the_text_whatever_the_lengths(seed: int, fraction: float) -> None:
    random = np.random.default_rng(seed)
    sizes = (random.pareto(0.7, 400) * 100).astype(np.int64) + 1  # a few documents hold most of the text
    held = select_held_out(random.integers(0, 1 << 64, 400, dtype=np.uint64), sizes, fraction)
    share, typical = fraction * sizes.sum(), float(np.median(sizes))
    assert 0 < held.sum() < 400
    assert sizes[held].max() <= max(share, 4 * typical)
    assert sizes[held].sum() <= 2 * share + 8 * typical


@pytest.mark.parametrize("place", range(8))
def test_one_huge_document_beside_seven_is_trained_on(place: int) -> None:
    places = np.arange(1, 9, dtype=np.uint64) << np.uint64(60)
    sizes = np.full(8, 500)
    sizes[place] = 3_000_000
    held = select_held_out(places, sizes, 0.01)
    assert held.sum() == 1
    assert not held[place]


def test_an_evaluation_takes_a_fixed_sample_of_the_held_out_sequences(
    configure: Configure, markers: TokenizationSpec, corpus: Path
) -> None:
    data = configure(**own(corpus / "long.py"))
    whole = prepare_dataset(data, markers).dataset_info
    assert whole.eval_sequences == whole.held_out_sequences > 8
    few = data.model_copy(update={"eval": data.eval.model_copy(update={"max_sequences": 5})})
    fewer = data.model_copy(update={"eval": data.eval.model_copy(update={"max_sequences": 3})})
    infos = [prepare_dataset(each, markers).dataset_info for each in (few, fewer)]
    assert [(info.eval_sequences, info.held_out_sequences) for info in infos] == [
        (5, whole.held_out_sequences),
        (3, whole.held_out_sequences),
    ]
    assert {info.fingerprint for info in infos} == {whole.fingerprint}
    batches = [
        next(PackedDataset(info, global_batch=1).iter_eval_batches(0, 1, 64)).input_ids for info in (whole, *infos)
    ]
    assert [len(batch) for batch in batches[1:]] == [5, 3]
    assert (batches[0][:5] == batches[1]).all()
    assert (batches[1][:3] == batches[2]).all()


def build_questions(count: int, first: int = 0) -> list[dict[str, str]]:
    return [
        {"prompt": f"Number {number}?", "completion": f"It is {number}." * (1 + number % 3)}
        for number in range(first, first + count)
    ]


def find_long_chat_in_fraction(source: dict[str, Any], folder: Path, fraction: float) -> dict[str, str]:
    """A conversation of 20,000 characters that its hash would hold out."""
    rows = [{"prompt": f"Long {number}?", "completion": f"It is {number}." * 1500} for number in range(64)]
    path = write_json_lines(folder / "long.jsonl", rows)
    found = read_source_documents(SourceConfig.model_validate({**source, "path": str(path)}), 0)
    places = [int.from_bytes(document.content_digest[:8], "big") * 2.0**-64 for document in found]
    return rows[int(np.argmax(np.array(places) < fraction))]


def test_chats_are_held_out_by_hash_kept_whole_and_evaluated_up_to_the_cap(
    configure: Configure, markers: TokenizationSpec, encoder: TextEncoder, tmp_path: Path
) -> None:
    source = {"format": "chat", "prompt_template": "starcoder"}
    rows = [*build_questions(300), find_long_chat_in_fraction(source, tmp_path, 0.1)]

    def prepare(path: Path, cap: int | None = None) -> PreparedDataset:
        config = configure(sources=[{**source, "path": str(path)}], sequence_length=256, eval={"fraction": 0.1})
        return prepare_dataset(config.model_copy(update={"eval": EvalConfig(max_sequences=cap or "auto")}), markers)

    chats = write_json_lines(tmp_path / "chats.jsonl", rows)
    prepared = prepare(chats)
    held = DocumentIndex.read(prepared.directory / "documents").held
    assert 15 <= held.sum() <= 60
    assert not held[-1]  # more text than the whole share, though its hash lies in the fraction
    info, dataset = prepared.dataset_info, PackedDataset(prepared.dataset_info, global_batch=1)
    examples = [example for _, example in dataset.iter_held_out_examples()]
    texts = [encoder.decode(example.tokens) for example in examples]
    chosen = [row for row, is_held in zip(rows, held, strict=True) if is_held]
    end = markers.tokens.end_of_text
    assert texts == [f"Question: {row['prompt']}\n\nAnswer: {row['completion']}{end}" for row in chosen]
    learnt = [encoder.decode(example.tokens[example.loss]) for example in examples]
    assert learnt == [f"{row['completion']}{end}" for row in chosen]
    assert info.held_out_sequences <= -(-sum(len(example.tokens) for example in examples) // 128)  # packed
    longer = write_json_lines(tmp_path / "longer.jsonl", build_questions(100, first=300) + rows)
    more = DocumentIndex.read(prepare(longer).directory / "documents")
    assert (more.held[100:] == held).all()
    capped = prepare(chats, cap=2).dataset_info
    assert (capped.fingerprint, capped.eval_sequences) == (info.fingerprint, 2)
    assert capped.held_out_sequences == info.held_out_sequences > 2
    first = [next(PackedDataset(each, global_batch=1).iter_eval_batches(0, 1, 2)).input_ids for each in (info, capped)]
    assert (first[0] == first[1]).all()


@pytest.mark.parametrize(
    ("train", "interval", "expected"),
    [
        ({"steps": 1000, "global_batch_size": 64}, 200, 256),
        ({"epochs": 1, "global_batch_size": 512}, 100, 1024),
        ({"steps": 10, "global_batch_size": 64}, 200, 16),  # 65,536 tokens
    ],
)
def test_the_default_is_two_percent_of_what_is_trained_meanwhile(
    configure: Configure, train: dict[str, int], interval: int, expected: int
) -> None:
    values = configure(sequence_length=4096).model_dump(mode="json")
    config = Config.model_validate_json(json.dumps({**values, "train": train, "eval": {"interval": interval}}))
    assert config.max_eval_sequences == expected


def test_a_survey_reads_back_what_was_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_training_toolkit.data.prepare.arrow_store._ROWS_PER_BATCH", 7)
    lines = [json.dumps({"text": f"number {i}" if i % 5 else ""}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    of = data(tmp_path / "a.jsonl", form="text", eval={"fraction": 0.2})
    taken = document_index(of, tmp_path / "out")
    assert taken.hashes.shape == (32, 16)
    assert taken.count_documents(held=True) + taken.count_documents(held=False) == 32
    assert taken.count_documents(held=True, source=0) == taken.held.sum() > 0
    assert taken.dropped == [{"empty": 8}]
    names = read_column(tmp_path / "out" / "documents.arrow", "name").to_pylist()
    assert names == [f"a.jsonl:{i + 1}" for i in range(40) if i % 5]
    both = texts(of, taken, held=True) + texts(of, taken, held=False)
    assert sorted(both) == sorted(f"number {i}" for i in range(40) if i % 5)


def repositories(folder: Path, count: int) -> Path:
    for i in range(count):
        (folder / f"r{i}" / ".git").mkdir(parents=True)
        for j in range(5):
            (folder / f"r{i}" / f"{j}.py").write_text(f"file {j} of {i}\n", encoding="utf-8")
    return folder


def test_by_repository_no_file_of_a_held_out_one_is_trained_on(tmp_path: Path) -> None:
    of = data(repositories(tmp_path / "all", 20), eval={"fraction": 0.2, "split_by": "repository"})
    taken = document_index(of, tmp_path / "out")
    held, trained = ({text.split()[-1] for text in texts(of, taken, held=side)} for side in (True, False))
    assert held
    assert trained
    assert held.isdisjoint(trained)
    assert taken.count_documents(held=True) == 5 * len(held)
    by_document = document_index(data(tmp_path / "all", eval={"fraction": 0.2}), tmp_path / "by_document")
    assert by_document.count_documents(held=True) % 5
    # The name decides, not the content: a repository keeps its side when its files change.
    for path in (tmp_path / "all").rglob("*.py"):
        path.write_text("changed: " + path.read_text(encoding="utf-8"), encoding="utf-8")
    again = document_index(of, tmp_path / "again")
    assert {text.split()[-1] for text in texts(of, again, held=True)} == held


def test_one_repository_cannot_be_held_out_of_itself(tmp_path: Path) -> None:
    of = data(repositories(tmp_path / "all", 1), eval={"split_by": "repository"})
    with pytest.raises(DataError, match="all documents are of one repository"):
        document_index(of, tmp_path / "out")


def own(path: Path, **more: Any) -> dict[str, Any]:
    return {"eval": {"sources": [{"path": str(path), "format": "code", **more}]}}


def test_files_of_ones_own_are_held_out_and_never_trained_on(tmp_path: Path) -> None:
    for folder, names in {"train": "abcd", "eval": "cx"}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{folder}_{name}.py").write_text(f"{name}\n", encoding="utf-8")
    (tmp_path / "eval" / "again.py").write_text("x\n", encoding="utf-8")
    of = data(tmp_path / "train", **own(tmp_path / "eval"))
    taken = document_index(of, tmp_path / "out")
    assert texts(of, taken, held=True) == ["x\n", "c\n"]
    assert texts(of, taken, held=False) == ["a\n", "b\n", "d\n"]
    assert taken.dropped == [{"in_eval": 1}, {"duplicate": 1}]
    assert [taken.count_documents(held=held, source=source) for held in (True, False) for source in (0, 1)] == [
        0,
        2,
        3,
        0,
    ]


@pytest.mark.parametrize("trained", ["file", "repository"])
@pytest.mark.parametrize("evaluated", ["file", "repository"])
def test_no_file_of_the_evaluation_is_trained_on_in_a_repository_either(
    tmp_path: Path, trained: str, evaluated: str
) -> None:
    repositories(tmp_path / "train", 3)
    repositories(tmp_path / "eval", 1)
    (tmp_path / "eval/r0/own.py").write_text("own\n", encoding="utf-8")
    of = data(
        sources=[{"path": str(tmp_path / "train"), "format": "code", "group_by": trained}],
        **own(tmp_path / "eval", group_by=evaluated),
    )
    taken = document_index(of, tmp_path / "out")
    together = "".join(texts(of, taken, held=False))
    assert "of 0" not in together
    assert together.count("of 1") == together.count("of 2") == 5
    assert taken.dropped[0] == {"in_eval": 5}


def test_an_evaluation_of_nothing_is_an_error(tmp_path: Path) -> None:
    repositories(tmp_path / "train", 1)
    (tmp_path / "empty.py").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"data\.eval\.sources: no document is left .*empty\.py"):
        document_index(data(tmp_path / "train", **own(tmp_path / "empty.py")), tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.sources: no document is left"):
        document_index(data(tmp_path / "train", **own(tmp_path / "train")), tmp_path / "out2")


def held_out_text(prepared: PreparedDataset, encoder: TextEncoder) -> str:
    examples = ExampleStore(prepared.directory / "held_out")
    return "".join(encoder.decode(examples[i].tokens) for i in range(len(examples)))


def test_a_run_with_an_evaluation_of_its_own(
    configure: Configure, markers: TokenizationSpec, corpus: Path, encoder: TextEncoder, tmp_path: Path
) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "unseen.py").write_text("def unseen(first): ...\n", encoding="utf-8")
    (tmp_path / "eval" / "seen.py").write_bytes((corpus / "file07.py").read_bytes())
    config = configure(fim={"rate": 1.0}, **own(tmp_path / "eval"))
    prepared = prepare_dataset(config, markers)
    trained, evaluated = prepared.dataset_info.sources
    assert (trained.documents, trained.held_out, trained.dropped) == (40, 0, {"in_eval": 1})
    assert (evaluated.documents, evaluated.held_out, evaluated.tokens) == (2, 2, 0)
    assert evaluated.path == str(tmp_path / "eval")
    text = held_out_text(prepared, encoder)
    assert text.count("<|endoftext|>") == 2
    assert "def unseen(first): ...\n<|endoftext|>" in text
    assert "<fim_middle>" not in text
    (tmp_path / "eval" / "unseen.py").write_text("def unseen(second): ...\n", encoding="utf-8")
    assert prepare_dataset(config, markers).dataset_info.fingerprint != prepared.dataset_info.fingerprint


def test_a_hash_takes_sixteen_bytes(tmp_path: Path) -> None:
    repositories(tmp_path / "all", 2)
    seen: set[bytes] = set()
    list(read_source_documents(data(tmp_path / "all").sources[0], 0, seen=seen))
    assert {len(digest) for digest in seen} == {16}
    assert len(seen) == 10


def test_verifying_reads_the_content(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    for i in range(20):
        (folder / f"f{i:02}.py").write_text(f"x = {i:02}\n", encoding="utf-8")
    (folder / "empty.py").write_text("      \n", encoding="utf-8")
    of = data(folder, eval={"fraction": 0.2})
    document_index(of, tmp_path / "out")
    seen = list[int]()
    verify_document_index(of, tmp_path / "out", seen.append)
    assert seen[-1] == 20
    (folder / "f07.py").write_text("x = 99\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"f07\.py is not what was prepared \(20 documents then, 20 now\)\. Remove"):
        verify_document_index(of, tmp_path / "out", seen.append)
    (folder / "f07.py").write_text("x = 07\n", encoding="utf-8")
    (folder / "empty.py").write_text("x = 20\n", encoding="utf-8")  # it was no document, and is one now
    with pytest.raises(DataError, match=r"empty\.py is not what was prepared \(20 documents then, 21 now\)"):
        verify_document_index(of, tmp_path / "out", seen.append)
