"""Sizes: whatever a file holds, memory is bounded; what is too large is cut or refused, and counted."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data import tokenizer as tokenizer_module
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.sources import DocumentStats, decompress, read_source_documents
from llm_training_toolkit.data.sources.json_list import iter_json_list
from llm_training_toolkit.data.sources.text import iter_file_pieces
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, split_long_text
from llm_training_toolkit.errors import DataError
from tiny_tokenizer import CODE

Configure = Callable[..., Config]
KIB = 1 / 1024  # max_document_mb of a KiB


def source(path: Path, form: str = "text", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "format": form, "max_document_mb": KIB, **more})


@given(st.text(alphabet="aé😀\n", max_size=60), st.integers(4, 40))
def test_pieces_of_a_file_are_its_text(text: str, most: int) -> None:
    pieces = list(iter_file_pieces(io.BytesIO(text.encode()), most))
    assert "".join(piece.content.decode() for piece in pieces) == text
    assert all(len(piece.content) <= most for piece in pieces)
    assert [piece.first_byte for piece in pieces] == [text.encode().find(b"")] + [
        sum(len(before.content) for before in pieces[:number]) for number in range(1, len(pieces))
    ]
    for piece in pieces:
        assert piece.first_line == 1 + text.encode()[: piece.first_byte].count(b"\n")


def test_a_large_file_is_cut_at_lines_and_read_again_from_any_piece(
    tmp_path: Path, configure: Configure, markers: TokenizationSpec
) -> None:
    lines = "".join(f"value_{number} = {number * 7919}\n" for number in range(300))
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "big.py").write_text(lines, encoding="utf-8")
    (folder / "small.py").write_text("x = 1\n", encoding="utf-8")
    tally = DocumentStats()
    found = list(read_source_documents(source(folder, "code"), 0, tally=tally))
    big = [document for document in found if document.path == "big.py"]
    assert [document.name for document in big] == [f"big.py:{number}" for number in range(1, len(big) + 1)]
    assert "".join(document.text for document in big) == lines
    assert all(document.text.endswith("\n") and len(document.text) <= 1024 for document in big)
    assert (found[-1].name, tally.cut) == ("small.py", 1)
    data = configure(sources=[source(folder, "code").model_dump(mode="json")], eval={"fraction": 0.2})
    (info,) = prepare_dataset(data, markers).dataset_info.sources
    assert (info.documents, info.cut) == (len(big) + 1, 1)


def test_an_invalid_byte_of_a_large_file_is_placed_and_costs_its_piece(tmp_path: Path) -> None:
    content = b"line\n" * 300 + b"\xff\n" + b"line\n" * 300
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt:301: is not UTF-8 \(byte 0xff at byte 1500\)"):
        list(read_source_documents(source(tmp_path / "a.txt"), 0))
    tally = DocumentStats()
    kept = list(read_source_documents(source(tmp_path / "a.txt"), 0, on_error="skip", tally=tally, seen=set()))
    assert len(kept) >= 1
    assert tally.skipped == {"invalid_utf8": 1}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_a_large_record_is_refused_and_the_others_are_kept(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "one"}, {"text": "x" * 3000}, {"text": "three"}, {"text": "y" * 900}]
    path = tmp_path / f"a.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tally = DocumentStats()
    kept = read_source_documents(source(path), 0, on_error="skip", tally=tally)
    assert [document.text[:5] for document in kept] == ["one", "three", "yyyyy"]
    assert tally.skipped == {"too_large": 1}
    with pytest.raises(DataError, match=r"a\.\w+(:|, row )2: has 0\.0 MiB, more than the 0\.0 of max_document_mb"):
        list(read_source_documents(source(path), 0))


@given(st.lists(st.recursive(st.integers() | st.text() | st.none(), st.lists, max_leaves=5), max_size=6))
def test_a_json_list_is_read_item_by_item(values: list[Any]) -> None:
    for text in (json.dumps(values), json.dumps(values, indent=1, ensure_ascii=False) + "\n"):
        stream = io.BufferedReader(io.BytesIO(text.encode(errors="surrogatepass")))
        try:
            text.encode()
        except UnicodeEncodeError:
            continue
        assert [value for _, value in iter_json_list(stream, "a", 1 << 20)] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", r"a\.json, record 2: is not JSON"),
        ('[{"text": "a"} {}]', "record 1: is not JSON .*Expecting ','"),
        ('[{"text": "a"}] x', "Extra data"),
        ('["' + "x" * 3_000_000, r"record 1: .*larger than 0\.0 MiB"),
    ],
)
def test_a_json_list_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read_source_documents(source(tmp_path / "a.json", "text"), 0, on_error="skip"))


def test_a_large_repository_is_cut_between_files(tmp_path: Path) -> None:
    rows = [{"content": f"{n:03}" * 100, "repo_name": "r", "path": f"{n}.py"} for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tally = DocumentStats()
    found = list(read_source_documents(source(tmp_path / "a.jsonl", "code", group_by="repository"), 0, tally=tally))
    assert [(document.name, len(document.parts)) for document in found] == [
        ("r", 3),
        ("r:2", 3),
        ("r:3", 3),
        ("r:4", 1),
    ]
    assert tally.cut == 1


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    lines = b'{"text": "same"}\n' * 100_000
    packed = pa.Codec("zstd").compress(lines).to_pybytes() if suffix == ".zst" else pack[suffix](lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    monkeypatch.setattr(decompress, "_WATCHED_FROM", 1 << 19)
    monkeypatch.setattr(decompress, "_MAX_EXPANSION", 50)
    with pytest.raises(DataError, match=r"expands more than 50-fold.*how much that is is not known"):
        list(read_source_documents(source(tmp_path), 0, on_error="skip"))


@pytest.mark.parametrize("text", [CODE, "one two  three\n\n four\n", "wörd 漢字\r\nnext  x = 1\n\n\n  y"])
@pytest.mark.parametrize("longest", [40, 64])
def test_pieces_of_a_text_have_its_tokens(
    monkeypatch: pytest.MonkeyPatch, encoder: TextEncoder, text: str, longest: int
) -> None:
    whole = text * 20
    (expected,) = encoder.encode_batch([whole])
    pieces = list(split_long_text(whole, longest))
    assert "".join(pieces) == whole
    assert max(map(len, pieces)) <= longest
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", longest)
    monkeypatch.setattr(tokenizer_module.split_long_text, "__defaults__", (longest,))
    short, found = encoder.encode_batch(["short", whole])
    assert short.ids.tolist() == encoder.encode("short")
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.char_spans.tolist() == expected.char_spans.tolist()


@pytest.mark.parametrize("model", ["starcoder2-3b", "qwen2.5-coder-0.5b"])
def test_pieces_have_the_tokens_of_both_families(tmp_path: Path, model: str) -> None:
    text = (CODE + "\r\n".join("wörd  漢字 x1 = 22 'é'\t\t y" for _ in range(5)) + "\n\n\n  z = 1\n") * 40
    spec = TokenizationSpec.from_family(families.find_size(model).family)
    tokenizer_module.train_tokenizer([text], 600, spec, tmp_path)
    encoder = tokenizer_module.open_tokenizer(str(tmp_path))
    pieces = list(split_long_text(text, 500))
    assert len(pieces) > 10
    assert [token for piece in pieces for token in encoder.encode(piece)] == encoder.encode(text)


_MEASURE = """\
import resource, sys
from pathlib import Path
import pyarrow.parquet, tokenizers
from tiny_tokenizer import MARKERS
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare.builder import prepare_dataset
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = peak()
folder, tokenizer, path, limit = sys.argv[1:]
config = Config.model_validate({
    "run": {"name": "x", "dir": folder}, "model": {"name": "starcoder2-3b"}, "tokenizer": {"path": tokenizer},
    "data": {"sequence_length": 1024, "eval": {"fraction": 0.0},
             "sources": [{"path": path, "format": "text", "max_document_mb": float(limit)}]},
    "train": {"epochs": 1}})
info = prepare_dataset(config, MARKERS).dataset_info.sources[0]
print(info.documents, info.cut, peak() - before)
"""


def measure(folder: Path, tokenizer: Path, path: Path, limit: float) -> tuple[int, int, float]:
    """Prepare one file in a process of its own; documents, files cut, and MiB above what the imports take."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAYON_NUM_THREADS": "2"}
    arguments = [sys.executable, "-c", _MEASURE, str(folder), str(tokenizer), str(path), str(limit)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    documents, cut, mebibytes = done.stdout.split()
    return int(documents), int(cut), float(mebibytes)


@pytest.mark.slow
def test_one_compressed_document_does_not_take_the_memory(tmp_path: Path, tokenizer_path: Path) -> None:
    """Stated bound: 700 MiB and 50 times `max_document_mb`, whatever the size of the document."""
    path = tmp_path / "a.txt.gz"
    with gzip.open(path, "wb") as stream:
        for number in range(8 * 16):
            line = f"line {number} of a document that was packed very small\n".encode()
            stream.write(line * ((1 << 16) // len(line)))
    documents, cut, peak = measure(tmp_path / "runs", tokenizer_path, path, 0.5)
    assert (documents, cut) == (16, 1)
    assert peak < 700 + 50 * 0.5


def test_a_line_of_any_length_is_read_past(tmp_path: Path, tokenizer_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(b'{"text": "first"}\n{"text": "')
        for _ in range(150):
            stream.write(b"x" * (1 << 20))
        stream.write(b'"}\n{"text": "last"}\n')
    wanted = {"path": str(path), "format": "text", "max_document_mb": 1}
    script = f"""
import resource
from llm_training_toolkit.config.data_config import SourceConfig
from llm_training_toolkit.data.sources import DocumentStats, read_source_documents
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, tally = peak(), DocumentStats()
source = SourceConfig.model_validate({wanted!r})
found = [d.text for d in read_source_documents(source, 0, on_error="skip", tally=tally)]
print(found, dict(tally.skipped), peak() - before < 60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['first', 'last'] {'too_large': 1} True\n"


def test_a_row_group_is_not_read_as_a_whole(tmp_path: Path) -> None:
    """A row group of 50 MiB: some batches of 128 rows, and some pages, are in memory."""
    path = tmp_path / "a.parquet"
    text = pa.array([f"{number:04}" + os.urandom(5 << 10).hex() for number in range(5000)])
    pq.write_table(pa.table({"text": text}), path, row_group_size=5000, write_batch_size=64)
    del text
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_source_documents(source(path, max_document_mb=1), 0):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 20 << 20
