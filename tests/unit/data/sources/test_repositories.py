"""Repositories: which files belong to which, and whole repositories as documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import (
    Document,
    DocumentStats,
    RepositoryFile,
    content_hash,
    read_source_documents,
)
from llm_training_toolkit.errors import DataError


def source(path: object, **more: Any) -> SourceConfig:
    return SourceConfig.model_validate({"path": str(path), "format": "code", **more})


def read(path: object, **more: Any) -> list[Document]:
    return list(read_source_documents(source(path, group_by="repository", **more), 0))


def tree(top: Path, *names: str) -> None:
    for name in names:
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n", encoding="utf-8")


def test_a_directory_is_a_repository_with_its_files_in_order(tmp_path: Path) -> None:
    tree(tmp_path / "app", "b.py", "a/z.py", ".git/config.py", "a.py", "README.md")
    (document,) = read(tmp_path / "app")
    names = ("README.md", "a.py", "a/z.py", "b.py")
    assert document.parts == tuple(RepositoryFile(name, f"# {name}\n") for name in names)
    assert (document.name, document.repository, document.path) == ("app", "app", "")
    assert document.text == "".join(part.text for part in document.parts)
    assert document.content_digest == content_hash(document.text)


def test_checkouts_below_a_directory_are_repositories_of_their_own(tmp_path: Path) -> None:
    tree(tmp_path / "all", "me/app/.git/HEAD", "me/app/src/x.py", "tool/t.py", "loose.py", "all/.git/HEAD", "all/i.py")
    (tmp_path / "all/tool/.git").write_text("gitdir: elsewhere", encoding="utf-8")  # a worktree, or a submodule
    found = {document.name: [part.path for part in document.parts] for document in read(tmp_path / "all")}
    assert found == {"all": ["loose.py"], "all/all": ["i.py"], "me/app": ["src/x.py"], "tool": ["t.py"]}
    by_file = {d.name: (d.repository, d.path) for d in read_source_documents(source(tmp_path / "all"), 0)}
    assert by_file["me/app/src/x.py"] == ("me/app", "src/x.py")
    assert by_file["loose.py"] == ("all", "loose.py")
    by_glob = {
        d.name: (d.repository, d.path) for d in read_source_documents(source(tmp_path / "all" / "**" / "*.py"), 0)
    }
    assert by_glob == by_file


def test_repositories_come_by_name_whatever_the_order_of_their_files(tmp_path: Path) -> None:
    tree(tmp_path, "a-b/.git/HEAD", "a-b/x.py", "a/.git/HEAD", "a/x.py", "a/y/z.py")
    assert [document.name for document in read(tmp_path)] == ["a", "a-b"]


def rows() -> list[dict[str, Any]]:
    """Files of three repositories, far apart and out of order."""
    order = [("r/b", "2"), ("r/a", "z"), ("r/b", "10"), ("r/a", "b"), ("r/c", "only"), ("r/b", "1"), ("r/a", "a")]
    return [
        {"content": f"{repo} {path}\n", "repo_name": repo, "path": path, "stars": 5 if path == "b" else None}
        for repo, path in order
    ]


def test_records_of_a_repository_are_gathered(tmp_path: Path) -> None:
    records = rows()
    for name, part in (("1.jsonl", records[:3]), ("2.jsonl", records[3:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)), encoding="utf-8")
    found = read(tmp_path / "*.jsonl")
    assert [document.name for document in found] == ["r/a", "r/b", "r/c"]
    assert [part.path for part in found[0].parts] == ["a", "b", "z"]
    assert [part.path for part in found[1].parts] == ["1", "10", "2"]
    assert found[0].stars == 5
    assert found[0].text == "r/a a\nr/a b\nr/a z\n"


def test_a_record_without_a_repository_is_named_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "repo_name": "r"}\n{"content": "y"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: belongs to no repository"):
        read(path)
    tally = DocumentStats()
    kept = list(read_source_documents(source(path, group_by="repository"), 0, on_error="skip", tally=tally))
    assert [document.text for document in kept] == ["x"]
    assert (dict(tally.skipped), tally.read) == ({"no_repository": 1}, 2)


def test_empty_files_are_left_out_and_equal_repositories_dropped(tmp_path: Path) -> None:
    tree(tmp_path, "a/.git/HEAD", "b/.git/HEAD", "c/.git/HEAD")
    for repository in "ab":
        (tmp_path / repository / "x.py").write_text("same\n", encoding="utf-8")
    (tmp_path / "a" / "__init__.py").write_text(" \n", encoding="utf-8")
    (tmp_path / "c" / "__init__.py").write_text("", encoding="utf-8")
    tally = DocumentStats()
    found = list(read_source_documents(source(tmp_path, group_by="repository"), 0, tally=tally))
    assert [(document.name, document.parts) for document in found] == [("a", (RepositoryFile("x.py", "same\n"),))]
    assert dict(tally.dropped) == {"empty": 2, "duplicate": 1}
