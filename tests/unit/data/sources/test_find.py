"""Sources: what is found, in which order, what is dropped, and what errors say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import (
    DocumentStats,
    check_faults,
    fingerprint_sources,
    list_source_files,
    read_source_documents,
)
from llm_training_toolkit.errors import DataError


def source(path: object, form: str = "code", **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "format": form, **more})


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_directory_of_code_is_read_in_sorted_order_without_what_is_not_code(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.go", "a/b.rs", "C.TS", ".git/x.py", "node_modules/y.js", "env/lib/s.py", "p.png"):
        write(tmp_path / name, name)
    write(tmp_path / "env/pyvenv.cfg", "home = /usr")
    found = list(read_source_documents(source(tmp_path), 3))
    assert [document.name for document in found] == ["C.TS", "a/b.rs", "a/z.go", "b.py"]
    assert found[1].text == "a/b.rs"
    assert {document.source for document in found} == {3}


def test_globs_take_what_they_match_and_nothing_hidden(tmp_path: Path) -> None:
    for name in ("one.f90", "sub/two.f90", ".hidden/three.f90", "four.py"):
        write(tmp_path / name, name)
    assert [file.name for file in list_source_files(source(tmp_path / "**" / "*.f90"))] == ["one.f90", "sub/two.f90"]


def test_a_file_and_a_path_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "notes.odd", "text\r\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [document.text for document in read_source_documents(source("~/notes.odd"), 0)] == ["text\r\n"]
    monkeypatch.chdir(tmp_path)
    assert [document.name for document in read_source_documents(source("notes.odd", "text"), 0)] == ["notes.odd"]


def test_the_standard_library_is_there_without_its_tests() -> None:
    names = [file.name for file in list_source_files(source("python:stdlib"))]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idle_test"} & set(name.split("/"))]
    assert names == sorted(names)


def test_text_takes_whole_files_and_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.md", "# title")
    write(tmp_path / "b.jsonl", '{"text": "one"}\n\n{"text": "two", "x": 1}\n')
    write(tmp_path / "c.py", "not text")
    found = [(document.name, document.text) for document in read_source_documents(source(tmp_path, "text"), 0)]
    assert found == [("a.md", "# title"), ("b.jsonl:1", "one"), ("b.jsonl:3", "two")]


def test_empty_and_doubled_documents_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = ["a", "", " \n", "b", "a"]
    write(tmp_path / "d.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in lines))
    tally, seen = DocumentStats(), set[bytes]()
    kept = [
        document.text
        for document in read_source_documents(source(tmp_path / "d.jsonl", "text"), 0, tally=tally, seen=seen)
    ]
    assert kept == ["a", "b"]
    assert tally.kept == 2
    assert dict(tally.dropped) == {"empty": 2, "duplicate": 1}
    again = DocumentStats()
    assert not list(read_source_documents(source(tmp_path / "d.jsonl", "text"), 1, tally=again, seen=seen))
    assert again.dropped["duplicate"] == 3


BROKEN = [
    (b"{broken", "is not JSON", "invalid_json"),
    (b'{"body": "x"}', "no field 'text' or 'content'", "no_text"),
    (b"[1]", "no field 'text' or 'content'", "no_text"),
    (b'{"text": 5}', "int, not a string", "no_text"),
    (b'{"text": "\\ud800"}', "not text", "invalid_utf8"),
    (b'{"text": "\xff"}', "0xff", "invalid_utf8"),
]


@pytest.mark.parametrize(("line", "why", "reason"), BROKEN)
def test_a_broken_line_is_named_or_counted(tmp_path: Path, line: bytes, why: str, reason: str) -> None:
    path = write(tmp_path / "x.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "also"}\n')
    with pytest.raises(DataError) as raised:
        list(read_source_documents(source(path, "text"), 0))
    assert f"{path}:2" in str(raised.value)
    assert why in str(raised.value)
    assert "data.on_error: skip" in str(raised.value)
    tally = DocumentStats()
    kept = [document.text for document in read_source_documents(source(path, "text"), 0, on_error="skip", tally=tally)]
    assert kept == ["fine", "also"]
    assert dict(tally.skipped) == {reason: 1}


def test_a_code_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "latin.py", "a = 1\nb = 'é'\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.py:2: is not UTF-8 \(byte 0xe9"):
        list(read_source_documents(source(path), 0))


def test_too_many_skipped_documents_stop_with_the_first_one_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", '{"text": "a"}\nbroken\n{"text": "b"}\n{"text": "c"}\n')
    tally = DocumentStats()
    list(read_source_documents(source(path, "text"), 0, on_error="skip", tally=tally))
    check_faults([tally], skips=True, max_skipped=0.25)
    with pytest.raises(DataError, match=r"(?s)max_skipped: 1 of 4 documents.*x\.jsonl:2: is not JSON"):
        check_faults([tally], skips=True, max_skipped=0.2)
    with pytest.raises(DataError, match=r"(?s)1 of 4 documents.*x\.jsonl:2: is not JSON.*on_error: skip"):
        check_faults([tally], skips=False, max_skipped=1.0)


@pytest.mark.parametrize("path", ["nothing-here", "*.nothing", "file:///nothing/here"])
def test_a_path_without_files_is_an_error_that_repeats_it(path: str) -> None:
    with pytest.raises(DataError, match=r"data\.sources") as raised:
        list(read_source_documents(source(path), 0))
    assert path in str(raised.value)


def test_a_directory_that_may_not_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "x = 1")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    if os.access(closed, os.R_OK):
        pytest.skip("this user may list everything")
    with pytest.raises(DataError, match=r"closed cannot be listed \(Permission denied\)"):
        list(read_source_documents(source(tmp_path), 0))


def test_two_stars_at_the_end_are_every_file(tmp_path: Path) -> None:
    for name in ("a.x", "b/c.x", "b/.d/e.x"):
        write(tmp_path / name, name)
    assert [file.name for file in list_source_files(source(tmp_path / "**"))] == ["a.x", "b/c.x"]


def test_the_fingerprint_sees_names_sizes_and_times(tmp_path: Path) -> None:
    path = write(tmp_path / "one/a.py", "x = 1")
    before = fingerprint_sources([source(tmp_path)])
    assert fingerprint_sources([source(tmp_path)]) == before
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = fingerprint_sources([source(tmp_path)])
    path.rename(tmp_path / "one/b.py")
    assert len({before, touched, fingerprint_sources([source(tmp_path)])}) == 3
    with pytest.raises(DataError):
        fingerprint_sources([source(tmp_path / "absent")])
