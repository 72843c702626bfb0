"""Records: JSON lines, JSON, Parquet, Arrow, compressed or not; their fields, and what errors say."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.parse import Conversation
from llm_training_toolkit.data.sources import Document, DocumentStats, list_source_files, read_source_documents
from llm_training_toolkit.errors import DataError

ROWS = [{"text": "one", "other": 1}, {"text": "two", "other": 2}, {"text": "drei ü", "other": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def source(path: object, form: str = "text", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "format": form, **more})


def read(path: object, form: str = "text", **more: Any) -> list[Document]:
    return list(read_source_documents(source(path, form, **more), 0))


def arrow(rows: list[dict[str, Any]], path: Path, make: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def zst(content: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(content).to_pybytes()
    return compressed


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "json", "json of lines", "parquet", "arrow", "stream", "feather"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind.split(' ', maxsplit=1)[0]}"
    match kind:
        case "json":
            path.write_bytes(json.dumps(ROWS, indent=2).encode())
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
        case "arrow" | "feather":
            arrow(ROWS, path, pa.ipc.new_file)
        case "stream":  # what `datasets` keeps in its cache
            path = arrow(ROWS, tmp_path / "x.arrow", pa.ipc.new_stream)
        case _:
            path.write_bytes(b"\xef\xbb\xbf" + LINES)
    found = [(document.name, document.text) for document in read(path)]
    assert found == [(f"{path.name}:{number}", row["text"]) for number, row in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed_files_are_read_and_found_in_directories(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESSIONS[suffix](LINES))
    (tmp_path / f"b.txt{suffix}").write_bytes(COMPRESSIONS[suffix](b"whole\n"))
    assert [document.text for document in read(tmp_path)] == ["one", "two", "drei ü", "whole\n"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_file_cut_off_is_named_with_the_line_reached(tmp_path: Path, suffix: str) -> None:
    many = "".join(json.dumps({"text": f"{i * 7919}"}) + "\n" for i in range(5000)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESSIONS[suffix](many)[:-200])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}:\d+: is damaged or cut off"):
        read(path)
    # Nobody knows how many documents are behind it, so no share of skipped ones can be kept.
    with pytest.raises(DataError, match="how much that is is not known"):
        list(read_source_documents(source(path), 0, on_error="skip"))


def test_a_table_cut_off_is_no_single_document_to_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i}" for i in range(1000)]}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="how much that is is not known"):
        list(read_source_documents(source(path), 0, on_error="skip"))


def test_what_json_and_tables_may_hold_is_no_traceback(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    long = '{"text": "two", "n": ' + "9" * 5000 + "}"
    lines.write_text("\n".join(['{"text": "one"}', long, '{"content": "three", "stars": Infinity}']))
    tally = DocumentStats()
    kept = list(read_source_documents(source(lines, form="code"), 0, on_error="skip", tally=tally))
    assert [document.text for document in kept] == ["one"]
    assert dict(tally.skipped) == {"invalid_json": 1, "wrong_type": 1}
    table = tmp_path / "b.parquet"
    wrong = pa.array([b"good", b"\xff\xfe", b"too"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": wrong}), table)
    tally = DocumentStats()
    assert [document.text for document in read_source_documents(source(table), 0, on_error="skip", tally=tally)] == [
        "good",
        "too",
    ]
    assert dict(tally.skipped) == {"invalid_utf8": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"ARROW1"])
def test_what_is_no_such_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    if name == "a.json" and not content:
        assert not read(path)
        return
    with pytest.raises(DataError, match=rf"{name}(:\d)?: is (damaged|not JSON)"):
        read(path)


def test_truncated_tables_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    arrow(ROWS, tmp_path / "b.arrow", pa.ipc.new_file)
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match=rf"{path.name}: is damaged"):
            read(path)


@pytest.mark.parametrize("name", ["a.parquet", "b.arrow"])
def test_a_table_of_another_schema_names_its_columns_and_counts_its_rows(tmp_path: Path, name: str) -> None:
    rows = [{"body": str(i), "number": i} for i in range(5)]
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        arrow(rows, tmp_path / name, pa.ipc.new_file)
    with pytest.raises(DataError, match=r"no column 'text' or 'content' \(its columns are \['body', 'number'\]\)"):
        read(tmp_path / name)
    tally = DocumentStats()
    assert not list(read_source_documents(source(tmp_path / name), 0, on_error="skip", tally=tally))
    assert (dict(tally.skipped), tally.read) == ({"no_text": 5}, 5)


def test_rows_that_cannot_be_read_are_named_or_counted(tmp_path: Path) -> None:
    rows = [{"text": "fine"}, {"text": None}, {"text": "also"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: the field 'text' is NoneType"):
        read(tmp_path / "a.parquet")
    tally = DocumentStats()
    kept = read_source_documents(source(tmp_path / "a.parquet"), 0, on_error="skip", tally=tally)
    assert [document.text for document in kept] == ["fine", "also"]
    assert dict(tally.skipped) == {"no_text": 1}


def test_bytes_in_a_table_are_text_where_they_are_utf8(tmp_path: Path) -> None:
    pq.write_table(pa.table({"content": [b"gr\xc3\xbcn", b"\xff"]}), tmp_path / "a.parquet")
    tally = DocumentStats()
    kept = read_source_documents(source(tmp_path / "a.parquet"), 0, on_error="skip", tally=tally)
    assert [document.text for document in kept] == ["grün"]
    assert dict(tally.skipped) == {"invalid_utf8": 1}


NAMES = [
    ("content", "path", "repository", "stars"),
    ("content", "max_stars_repo_path", "max_stars_repo_name", "max_stars_count"),  # The Stack, StarCoderData
    ("content", "path", "repository_name", "stars"),  # the-stack-smol
    ("content", "path", "repo_name", "star_events_count"),  # The Stack v2
    ("code", "path", "repo_name", "stars"),  # github-code
    ("text", "file_path", "repo_name", "stars"),
]


@pytest.mark.parametrize("names", NAMES)
def test_code_records_bring_path_repository_and_stars(tmp_path: Path, names: tuple[str, ...]) -> None:
    rows = [dict(zip(names, ("x = 1\n", "src/a.py", "me/app", 7), strict=True)) | {"lang": "Python"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        (document,) = read(tmp_path / name, "code")
        assert document == Document(0, f"{name}:1", "x = 1\n", "me/app", "src/a.py", 7)


def test_missing_metadata_is_no_error_and_wrong_metadata_is(tmp_path: Path) -> None:
    nan = pa.table({"content": ["a", "b"], "path": ["p", None], "stars": [float("nan"), 2.0]})
    pq.write_table(nan, tmp_path / "a.parquet")
    assert [(d.path, d.repository, d.stars) for d in read(tmp_path / "a.parquet", "code")] == [
        ("p", "", None),
        ("", "", 2),
    ]
    for wrong, said in (({"stars": "many"}, "'many', not a number of stars"), ({"path": 5}, "'path' is int")):
        (tmp_path / "b.jsonl").write_text(json.dumps({"content": "c", **wrong}), encoding="utf-8")
        with pytest.raises(DataError, match=rf"b\.jsonl:1: the field .*{said}"):
            read(tmp_path / "b.jsonl", "code")


def test_the_first_name_that_holds_something_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null, "content": "c"}\n{"text": "t", "content": "c2"}\n', "utf-8")
    assert [document.text for document in read(tmp_path / "a.jsonl")] == ["c", "t"]
    assert [document.text for document in read(tmp_path / "a.jsonl", "code")] == ["c", "c2"]


def test_a_directory_of_code_holds_records_only_where_nothing_else_is(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a data set", encoding="utf-8")
    (tmp_path / "train.jsonl").write_text('{"content": "x"}', encoding="utf-8")
    assert [document.text for document in read(tmp_path, "code")] == ["x"]
    (tmp_path / "a.py").write_text("y", encoding="utf-8")
    assert {file.name for file in list_source_files(source(tmp_path, "code"))} == {"README.md", "a.py"}
    assert [document.text for document in read(tmp_path / "*.jsonl", "code")] == ["x"]


def test_a_json_file_among_code_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('[{"content": 1}]', encoding="utf-8")
    assert [document.text for document in read(tmp_path / "*.json", "code")] == ['[{"content": 1}]']


CHATS: dict[str, list[dict[str, Any]]] = {
    "qwen.json": [{"id": "0", "conversations": [{"from": "user", "value": "?"}, {"from": "assistant", "value": "!"}]}],
    "openai.jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "pairs.jsonl.gz": [{"prompt": "c", "completion": "d"}],
    "table.parquet": [{"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]}],
}


def chats(folder: Path) -> None:
    for name, rows in CHATS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        else:
            content = json.dumps(rows).encode() if name.endswith(".json") else lines
            (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_a_directory_of_conversations(tmp_path: Path) -> None:
    chats(tmp_path)
    (tmp_path / "notes.txt").write_text("no conversation", encoding="utf-8")
    found = read(tmp_path, "chat")
    assert [document.name for document in found] == [f"{name}:1" for name in sorted(CHATS)]
    said = [[m.content for m in Conversation.from_text(document.text).messages] for document in found]
    assert said == [["a", "b"], ["c", "d"], ["?", "!"], ["e", "f"]]


def test_a_record_that_is_no_conversation_is_named_or_counted(tmp_path: Path) -> None:
    good = '{"prompt": "a", "completion": "b"}\n'
    bad = '{"messages": [{"role": "wizard", "content": "x"}]}\n'
    path = tmp_path / "a.jsonl"
    path.write_text(good + bad + '["x"]\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*wizard"):
        read(path, "chat")
    tally = DocumentStats()
    assert len(list(read_source_documents(source(path, "chat"), 0, on_error="skip", tally=tally))) == 1
    assert tally.skipped.total() == 2
    assert "unknown_role" in tally.skipped
    (tmp_path / "b.md").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.md: holds no records \(\.jsonl"):
        read(tmp_path / "b.md", "chat")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    text = "x" * 1000
    peaks = []
    for rows in (2_000, 20_000):
        table = pa.table({"text": [f"{i}{text}" for i in range(rows)], "junk": ["y" * 2000] * rows})
        paths = [tmp_path / "a.parquet", tmp_path / "b.arrow", tmp_path / "c.jsonl"]
        pq.write_table(table, paths[0], row_group_size=1000)
        with pa.OSFile(str(paths[1]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        with paths[2].open("w", encoding="utf-8") as stream:
            stream.writelines(f'{{"text": "{i}{text}"}}\n' for i in range(rows))
        del table
        arrow_before = pa.total_allocated_bytes()
        tracemalloc.start()
        taken = 0
        for path in paths:
            for _ in read_source_documents(source(path), 0, seen=set()):
                taken = max(taken, pa.total_allocated_bytes() - arrow_before)
        peaks.append((tracemalloc.get_traced_memory()[1], taken))
        tracemalloc.stop()
    hashes = 18_000 * 200
    assert peaks[1][0] < peaks[0][0] + hashes
    assert peaks[1][1] < 2 * peaks[0][1] + (1 << 20)
