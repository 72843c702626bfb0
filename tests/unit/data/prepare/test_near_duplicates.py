"""Near-duplicates: recall on planted ones, precision, order, memory, and what the dataset info says."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare.builder import DatasetBuilder, prepare_dataset
from llm_training_toolkit.data.prepare.document_index import DocumentIndex, build_document_index
from llm_training_toolkit.data.prepare.min_hash import Signature, compute_signature, get_band_rows, sign_in_process
from llm_training_toolkit.data.prepare.near_duplicates import NearDuplicateIndex
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.data.types import Document
from record_sets import write_json_lines

pytest.importorskip("rensa", reason="pinned in requirements.txt; near-duplicates alone need it")
Configure = Callable[..., Config]


def sign(text: str) -> Signature | None:
    return compute_signature(text, get_band_rows(0.8))


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[A-Za-z_0-9]+", text)
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def similarity(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def write_code(rng: random.Random, lines: int) -> list[str]:
    return [
        f"    {rng.choice('abcdefgh')}{rng.randrange(400)} = f{rng.randrange(900)}(x{rng.randrange(99)}, {number})\n"
        for number in range(lines)
    ]


def edit(rng: random.Random, lines: list[str], share: float) -> list[str]:
    return [f"    changed_{rng.randrange(10**6)}()\n" if rng.random() < share else line for line in lines]


def iter_pairs(count: int) -> Iterator[tuple[str, str, float]]:
    """Documents, each with a copy of which up to a tenth of the lines is edited, and their exact similarity."""
    rng = random.Random(7)
    for _ in range(count):
        lines = write_code(rng, rng.randrange(20, 120))
        one, other = "".join(lines), "".join(edit(rng, lines, rng.uniform(0.0, 0.15)))
        yield one, other, similarity(one, other)


def test_planted_near_duplicates_are_found_and_others_are_kept() -> None:
    found = near = wrong = dropped = 0
    with NearDuplicateIndex(0.8) as index:
        for one, other, exact in iter_pairs(400):
            assert index.add_document(sign(one))
            is_dropped = not index.add_document(sign(other))
            near += exact >= 0.8
            found += is_dropped and exact >= 0.8
            dropped += is_dropped
            wrong += is_dropped and exact < 0.8
            assert not is_dropped or exact >= 0.7
    assert near > 100
    assert found / near >= 0.95
    assert wrong / dropped <= 0.15  # their similarity is between 0.7 and 0.8


def test_common_head_makes_no_duplicate() -> None:
    rng = random.Random(3)
    head = "".join(write_code(rng, 20))  # such as a licence
    with NearDuplicateIndex(0.8) as index:
        assert all(index.add_document(sign(head + "".join(write_code(rng, 40)))) for _ in range(50))


def test_short_documents_are_near_nothing() -> None:
    with NearDuplicateIndex(0.8) as index:
        assert [index.add_document(sign("a b c d")) for _ in range(2)] == [True, True]
        assert [index.add_document(sign("a b c d e")) for _ in range(2)] == [True, False]


CYRILLIC = ["красный дом стоит на высоком берегу реки", "другой текст говорит совсем не о том же самом"]  # noqa: RUF001
CHINESE = ["这个函数返回列表中所有小于给定上限的数字", "数据库连接失败时程序会自动重试三次然后退出"]


@pytest.mark.parametrize("texts", [CYRILLIC, CHINESE])
def test_texts_of_other_scripts_are_compared_by_their_own_words(texts: list[str]) -> None:
    head = "Copyright 2026 by the authors "
    with NearDuplicateIndex(0.8) as index:
        assert [index.add_document(sign(head + text)) for text in (*texts, *texts)] == [True, True, False, False]
        assert [index.add_document(sign(text)) for text in (*texts, *texts)] == [True, True, False, False]


def test_long_document_takes_little_memory() -> None:
    text = " ".join(f"word{number}" for number in range(100_000))
    with NearDuplicateIndex(0.8) as index:
        tracemalloc.start()
        index.add_document(sign(text))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 8 << 20


def build_corpus(folder: Path) -> tuple[Path, Path]:
    rng = random.Random(5)
    folder.mkdir()
    base = [write_code(rng, 30) for _ in range(6)]
    rows = [{"content": "".join(lines)} for lines in base]
    near = [{"content": "".join([*lines, "    last()\n"])} for lines in base[:3]]
    first = write_json_lines(folder / "a.jsonl", rows)
    return first, write_json_lines(folder / "b.jsonl", [*near, {"content": "".join(write_code(rng, 30))}])


def test_near_duplicates_across_sources_are_counted_and_read_past(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path
) -> None:
    first, second = build_corpus(tmp_path / "records")
    sources = [{"path": str(path), "format": "code"} for path in (first, second)]
    config = configure(sources=sources, near_duplicates={}, eval={"fraction": 0.0})
    info = prepare_dataset(config, markers).dataset_info
    assert [source.dropped for source in info.sources] == [{}, {"near_duplicate": 3}]
    assert [source.documents for source in info.sources] == [6, 1]
    plain = prepare_dataset(configure(sources=sources, eval={"fraction": 0.0}), markers).dataset_info
    assert [source.documents for source in plain.sources] == [6, 4]
    assert plain.fingerprint != info.fingerprint


def test_near_duplicates_of_held_out_documents_are_not_trained_on(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path
) -> None:
    first, second = build_corpus(tmp_path / "records")
    config = configure(
        sources=[{"path": str(second), "format": "code"}],
        eval={"sources": [{"path": str(first), "format": "code"}]},
        near_duplicates={"threshold": 0.8},
    )
    builder = DatasetBuilder(config, markers, None, render_in_process)
    builder.build_parts([1])
    builder.verify_documents()
    index = DocumentIndex.read(builder.directory / "documents")
    assert index.dropped == [{"near_duplicate": 3}, {}]
    assert json.loads((builder.directory / "documents" / "stats.json").read_text())["dropped"][0]


def test_signatures_computed_ahead_keep_the_same_documents_and_read_nothing_behind_the_limit(
    configure: Configure, tmp_path: Path
) -> None:
    first, second = build_corpus(tmp_path / "records")
    with second.open("a") as file:
        file.write("no JSON\n")
    sources = [
        {"path": str(second), "format": "code", "limit": 1},
        {"path": str(first), "format": "code", "limit": 4},
        {"path": str(second), "format": "code", "limit": 1},
    ]
    data = configure(sources=sources, near_duplicates={}, eval={"fraction": 0.0}).data
    for name, signer in (("alone", sign_in_process), ("ahead", sign_in_batches)):
        (tmp_path / name).mkdir()
        build_document_index(data, tmp_path / name, lambda _done: None, signer=signer)
    for name in ("documents.arrow", "held.arrow", "stats.json"):
        assert (tmp_path / "ahead" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    stats = json.loads((tmp_path / "ahead" / "stats.json").read_text())
    assert stats["dropped"] == [{}, {"near_duplicate": 1}, {"duplicate": 1, "near_duplicate": 2}]


def sign_in_batches(documents: Iterator[Document], rows: int) -> Iterator[tuple[Document, Signature | None]]:
    while batch := list(islice(documents, 100)):
        yield from sign_in_process(iter(batch), rows)
