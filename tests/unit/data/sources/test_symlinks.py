"""Symbolic links out of a source: not followed unless the source says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_training_toolkit.config import SourceConfig
from llm_training_toolkit.data.sources.find import list_source_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "home" / "keys").mkdir(parents=True)
    (tmp_path / "home" / "secret.py").write_text("SECRET\n")
    (tmp_path / "home" / "keys" / "b.py").write_text("SECRET\n")
    code = tmp_path / "code"
    (code / "real").mkdir(parents=True)
    (code / "real" / "a.py").write_text("a\n")
    (code / "inside.py").symlink_to("real/a.py")
    (code / "out.py").symlink_to(tmp_path / "home" / "secret.py")
    (code / "chain.py").symlink_to("out.py")
    (code / "linked").symlink_to(tmp_path / "home" / "keys")
    return code


def names(path: Path, *, follow: bool = False) -> list[str]:
    source = SourceConfig(path=str(path), format="code", follow_symlinks=follow)
    return [file.name for file in list_source_files(source)]


def test_links_out_of_a_directory_or_glob_are_left_out(folder: Path) -> None:
    assert names(folder) == ["inside.py", "real/a.py"]
    assert names(folder / "*.py") == ["inside.py"]
    assert names(folder / "*" / "*.py") == ["real/a.py"]


def test_they_are_read_where_the_source_says_so(folder: Path) -> None:
    assert names(folder, follow=True) == ["chain.py", "inside.py", "out.py", "real/a.py"]
    assert names(folder / "*" / "*.py", follow=True) == ["linked/b.py", "real/a.py"]


def test_a_source_that_is_itself_a_link_is_what_was_asked_for(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    assert names(tmp_path / "alias") == ["inside.py", "real/a.py"]
    assert names(folder / "out.py") == ["out.py"]
