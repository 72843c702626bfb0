"""Shards: the same tokens however the work is cut, nothing done twice after a kill, nothing read that is not needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_tokenizer
from llm_training_toolkit.config import dump_config_json
from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare import document_index as survey_module
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import PreparedDataset
from llm_training_toolkit.data.prepare.document_index import (
    DocumentIndex,
    DocumentReader,
    DocumentShard,
    build_document_index,
    split_into_shards,
)
from llm_training_toolkit.data.prepare.shards import DoneCallback, RenderJob, ShardWriter, render_in_process
from llm_training_toolkit.data.tokenizer import TokenizationSpec
from llm_training_toolkit.errors import DataError

Configure = Callable[..., Config]


def tokens_of(prepared: PreparedDataset) -> list[tuple[int, list[int]]]:
    examples = ExampleStore(prepared.directory / prepared.dataset_info.streams[0].epochs[0].tokens)
    return [(examples[i].document, examples[i].tokens.tolist()) for i in range(len(examples))]


def test_the_tokens_are_the_same_however_the_work_is_cut(
    configure: Configure, markers: TokenizationSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare_dataset(configure(fim={"rate": 0.5}), markers)
    monkeypatch.setattr(survey_module, "_CHARACTERS_PER_SHARD", 200)
    cut = prepare_dataset(configure(fim={"rate": 0.5}, cache=str(tmp_path / "other")), markers)
    assert tokens_of(cut) == tokens_of(whole)
    assert len(list((cut.directory / "tokens-seed1-epoch0").glob("tokens-*.arrow"))) > 5
    assert cut.dataset_info.sources == whole.dataset_info.sources
    assert cut.dataset_info.streams == whole.dataset_info.streams


def a_source(folder: Path, kind: str) -> Path:
    rows = [{"text": "" if i % 7 == 3 else f"text {i % 50} of {kind}"} for i in range(80)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=9)
    elif kind == "arrow":
        with (
            pa.OSFile(str(folder / "rows.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as to,
        ):
            to.write_table(pa.Table.from_pylist(rows), max_chunksize=9)
    elif kind == "json":
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        return folder / "rows.json"
    elif kind == "jsonl":
        for name, part in (("a:1.jsonl", rows[:40]), ("b.jsonl", rows[40:])):
            (folder / name).write_text("\n".join(json.dumps(row) for row in part), encoding="utf-8")
    else:
        for i, row in enumerate(rows):
            (folder / f"f{i:03}.txt").write_text(row["text"], encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet", "arrow"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=st.lists(st.floats(0, 1), max_size=4))
def test_a_shard_begins_anywhere(tmp_path: Path, kind: str, edges: list[float]) -> None:
    folder, place = tmp_path / "source", tmp_path / "survey"
    if not place.exists():
        folder.mkdir()
        place.mkdir()
    path = a_source(folder, kind)
    data = DataConfig.model_validate({"sequence_length": 64, "sources": [{"path": str(path), "format": "text"}]})
    build_document_index(data, place, lambda _done: None)
    document_index = DocumentIndex.read(place)
    rows = len(document_index.get_source_rows(0))
    assert rows == 47  # of fifty different texts three are empty in both rounds
    cuts = sorted({0, rows, *(int(edge * rows) for edge in edges)})
    reader = DocumentReader(data, document_index)
    pieces = [
        (number, document.name, document.text)
        for first, stop in pairwise(cuts)
        for held in (True, False)
        for number, document in reader.read_documents(DocumentShard(0, first, stop), held=held)
    ]
    assert sorted(number for number, _, _ in pieces) == list(range(rows))
    assert {name for _, name, _ in pieces} == set(document_index.names.to_pylist())
    assert len({text for _, _, text in pieces}) == rows


def test_what_a_shard_does_not_need_is_not_read(configure: Configure, corpus: Path) -> None:
    data, place = configure().data, corpus.parent / "survey"
    place.mkdir()
    build_document_index(data, place, lambda _done: None)
    document_index = DocumentIndex.read(place)
    for number in (0, 1, 30):
        (corpus / f"file{number:02}.py").write_bytes(b"\xff no text any more")
    found = list(DocumentReader(data, document_index).read_documents(DocumentShard(0, 5, 20), held=False))
    assert found
    with pytest.raises(DataError, match=r"file30\.py.*not UTF-8"):
        list(DocumentReader(data, document_index).read_documents(DocumentShard(0, 25, 35), held=False))


def test_a_document_that_is_gone_is_named(configure: Configure, corpus: Path) -> None:
    data, place = configure().data, corpus.parent / "survey"
    place.mkdir()
    build_document_index(data, place, lambda _done: None)
    (corpus / "file07.py").write_text("other = True\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"file07\.py changed"):
        list(DocumentReader(data, DocumentIndex.read(place)).read_documents(DocumentShard(0, 0, 20), held=False))


def test_what_was_done_before_a_failure_is_not_done_again(
    configure: Configure, markers: TokenizationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey_module, "_CHARACTERS_PER_SHARD", 200)
    written: list[DocumentShard] = []
    render = ShardWriter._render_shard

    def counted(self: ShardWriter, directory: Path, shard: DocumentShard, done: DoneCallback) -> None:
        written.append(shard)
        render(self, directory, shard, done)

    monkeypatch.setattr(ShardWriter, "_render_shard", counted)

    def breaks_off(job: RenderJob, chosen: Sequence[DocumentShard], done: DoneCallback) -> None:
        render_in_process(job, chosen if job.held else chosen[:4], done)
        if not job.held:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(configure(), markers, runner=breaks_off)
    before = list(written)
    prepared = prepare_dataset(configure(), markers)
    assert not (prepared.directory / ".tokens.shards").exists()
    document_index = DocumentIndex.read(prepared.directory / "documents")
    everything = split_into_shards(configure().data, document_index, [0], held=False)
    assert written[len(before) :] == everything[4:]


_KILLED = """
import sys
from llm_training_toolkit.config import parse_config_json
from llm_training_toolkit.data.prepare import document_index
from llm_training_toolkit.data.prepare.builder import prepare_dataset
sys.path.insert(0, sys.argv[2])
from tiny_tokenizer import MARKERS
document_index._CHARACTERS_PER_SHARD = 3000
prepare_dataset(parse_config_json(open(sys.argv[1]).read()), MARKERS)
"""


@pytest.mark.slow
def test_sigkill_in_the_middle_loses_one_shard_at_most(
    configure: Configure, markers: TokenizationSpec, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(60):
        (corpus / f"more{i}.py").write_text("".join(f"more_{i}_{j} = {j * i}\n" for j in range(150)), encoding="utf-8")
    config = configure(fim={"rate": 1.0})
    monkeypatch.setattr(survey_module, "_CHARACTERS_PER_SHARD", 3000)
    (corpus.parent / "config.json").write_text(dump_config_json(config), encoding="utf-8")
    command = [
        sys.executable,
        "-c",
        _KILLED,
        str(corpus.parent / "config.json"),
        str(Path(tiny_tokenizer.__file__).parent),
    ]
    place, environment = corpus.parent / "runs" / ".cache", {**os.environ, "RAYON_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300
    while len(done := list(place.glob("*/.tokens-*.shards/source0-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert done
    assert not list(place.glob("*/tokens-seed*"))
    stamps = {path: path.stat().st_mtime_ns for path in done}
    kept: list[Path] = []

    def look(job: RenderJob, chosen: Sequence[DocumentShard], done: DoneCallback) -> None:
        render_in_process(job, chosen, done)
        kept.extend(path for path, stamp in stamps.items() if not job.held and path.stat().st_mtime_ns == stamp)

    again = prepare_dataset(config, markers, runner=look)
    assert kept == list(stamps)
    assert not list(again.directory.glob(".*"))
    untouched = prepare_dataset(configure(fim={"rate": 1.0}, cache=str(corpus.parent / "other")), markers)
    assert tokens_of(again) == tokens_of(untouched)
