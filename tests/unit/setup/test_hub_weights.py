"""Weights of the hub that cannot be had are a problem of the plan; a hub that is not there is a note, and no wait."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hub_server import hub, silent_server, use_hub
from llm_training_toolkit.commands.plan import plan_run
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.setup import hub_weights
from llm_training_toolkit.setup.hub_weights import ask_hub, ask_hub_commit

NAME = "someone/qwen3-0.6b"
FILES = {"config.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.mark.parametrize(
    ("path", "files", "token", "code"),
    [
        (NAME, FILES, "", None),
        (NAME, FILES, "needed", "hub-model-gated"),
        (NAME, {"config.json": b"{}", "pytorch_model.bin": b"pickled"}, "", "no-safetensors"),
        ("someone/qwen3-0.6bb", FILES, "", "no-such-hub-model"),
        ("a/path/that/is/missing", FILES, "", None),  # a note of the plan's own
    ],
)
def test_what_the_hub_says_of_weights(
    path: str, files: dict[str, bytes], token: str, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub(NAME, files, "models", token=token, is_listed=True) as endpoint:
        use_hub(endpoint, monkeypatch)
        answer = ask_hub(path)
    assert not answer.unreachable
    assert (answer.problem and answer.problem.code) == code


def test_a_login_that_was_let_in_sees_gated_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "needed")
    with hub(NAME, FILES, "models", token="needed", is_listed=True) as endpoint:
        use_hub(endpoint, monkeypatch)
        assert ask_hub(NAME).problem is None


def test_a_revision_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    with hub(NAME, {}, "models", commits={commit: FILES}, branches={"main": commit}) as endpoint:
        use_hub(endpoint, monkeypatch)
        assert ask_hub(NAME, "main").problem is None
        problem = ask_hub(NAME, "v9").problem
    assert problem is not None
    assert problem.code == "no-such-revision"


def test_a_hub_that_does_not_answer_is_a_note_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_weights, "PLAN_PATIENCE_SECONDS", 0.2)
    raw: dict[str, Any] = {
        "run": {"name": "x"},
        "model": {"name": "qwen3-0.6b", "path": NAME},
        "data": {"sequence_length": 128, "sources": [{"path": "y", "format": "code"}]},
        "train": {"steps": 1, "precision": "fp32"},
    }
    with silent_server() as endpoint:
        use_hub(endpoint, monkeypatch)
        begin = time.monotonic()
        plan, _ = plan_run(parse_config(raw, "test"))
    assert time.monotonic() - begin < 60
    assert plan.problems == ()
    assert any("no answer within 0.2 s" in note for note in plan.notes)


def test_an_error_of_another_kind_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://a server:of no form")
    unreachable = ask_hub(NAME).unreachable
    assert unreachable
    assert "no answer" not in unreachable
    assert ask_hub_commit(NAME, "main") is None


def test_a_resume_does_not_wait_for_the_commit_of_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    with hub(NAME, {}, "models", commits={commit: FILES}, branches={"main": commit}) as endpoint:
        use_hub(endpoint, monkeypatch)
        assert ask_hub_commit(NAME, "main") == commit
    monkeypatch.setattr(hub_weights, "PLAN_PATIENCE_SECONDS", 0.2)
    with silent_server() as endpoint:
        use_hub(endpoint, monkeypatch)
        monkeypatch.setattr(hub_weights, "_REQUEST_SECONDS", 60.0)
        begin = time.monotonic()
        assert ask_hub_commit(NAME, "main") is None
    assert time.monotonic() - begin < 30


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert ask_hub(NAME) == hub_weights.HubAnswer()
