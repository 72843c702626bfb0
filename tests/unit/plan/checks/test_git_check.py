"""Repositories that cannot be read are problems with a code, before a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from git_histories import History, day
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import list_source_files
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan.checks.git_check import find_git_problems


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    history = History(tmp_path_factory.mktemp("plan") / "app")
    for number in range(4):
        history.commit(str(number), a__py=f"{number}\n".encode())
    return history


def codes(path: Path | str, held_out: dict[str, Any] | list[dict[str, Any]] | None = None, **source: Any) -> list[str]:
    data: dict[str, Any] = {"sequence_length": 128, "sources": [{"path": str(path), "format": "git", **source}]}
    if held_out is not None:
        each = held_out if isinstance(held_out, list) else [held_out]
        data["eval"] = {"sources": [{"path": str(path), "format": "git", **fields} for fields in each]}
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"name": "qwen3-0.6b"},
            "tokenizer": {"path": "t"},
            "data": data,
            "train": {"steps": 1},
        }
    )
    found = list(find_git_problems(config.data))
    assert all(problem.fix and problem.where.startswith("data.") for problem in found)
    return [problem.code for problem in found]


def test_history_without_problems(history: History) -> None:
    assert codes(history.path) == []
    assert codes(history.path, before=day(2), held_out={"after": day(2)}) == []
    assert codes(f"file://{history.path}") == []


def test_bare_repository_and_worktree_are_read(history: History, tmp_path: Path) -> None:
    history.git("clone", "-q", "--bare", str(history.path), str(tmp_path / "bare.git"))
    history.git("worktree", "add", "-q", "--detach", str(tmp_path / "tree"))
    assert codes(tmp_path / "bare.git") == codes(tmp_path / "tree") == []


def test_repository_without_commits(tmp_path: Path) -> None:
    assert codes(History(tmp_path / "app").path) == ["git-no-history"]


def test_directory_that_is_no_repository(history: History, tmp_path: Path) -> None:
    (history.path / "sub").mkdir(exist_ok=True)
    assert codes(tmp_path) == codes(history.path / "sub") == ["git-not-a-repository"]
    assert codes("https://example.org/app.git") == ["git-not-local"]


def test_path_that_is_not_here_is_refused_by_the_preparation_alone(tmp_path: Path) -> None:
    assert codes(tmp_path / "none") == []
    with pytest.raises(DataError, match="is no git repository"):
        list_source_files(SourceConfig(path=str(tmp_path / "none"), format="git"))


def test_shallow_and_partial_clones(history: History, tmp_path: Path) -> None:
    history.git("clone", "-q", "--depth", "2", f"file://{history.path}", str(tmp_path / "shallow"))
    assert codes(tmp_path / "shallow") == ["git-shallow-clone"]
    history.git("config", "uploadpack.allowFilter", "true")
    history.git("clone", "-q", "--filter=blob:none", f"file://{history.path}", str(tmp_path / "partial"))
    assert codes(tmp_path / "partial") == ["git-partial-clone"]


def test_date_without_a_commit(history: History) -> None:
    assert codes(history.path, after=day(9)) == ["git-no-commit-after"]
    assert codes(history.path, before=day(0)) == ["git-no-commit-before"]
    assert codes(history.path, after=day(2), before=day(1)) == ["git-empty-period"]
    assert codes(history.path, after=day(3)) == codes(history.path, before=day(1)) == []


@pytest.mark.parametrize("limit", [{}, {"before": day(3)}])
def test_future_of_a_held_out_history_is_not_trained_on(history: History, limit: dict[str, str]) -> None:
    assert codes(history.path, held_out={"after": day(2)}, **limit) == ["git-trains-on-future"]


@pytest.mark.parametrize(
    "held_out",
    [[{"after": day(1)}, {"after": day(3)}], [{"after": day(3)}, {"after": day(1)}], [{}], [{}, {"after": day(3)}]],
)
def test_earliest_date_from_which_a_history_is_held_out_counts(
    history: History, held_out: list[dict[str, str]]
) -> None:
    assert codes(history.path, held_out=held_out, before=day(2)) == ["git-trains-on-future"]
    if all(held_out):
        assert codes(history.path, held_out=held_out, before=day(1)) == []


def test_machine_without_git(history: History, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert codes(history.path) == ["git-missing"]
    with pytest.raises(DataError, match="not on the PATH"):
        list_source_files(SourceConfig(path=str(history.path), format="git"))
