"""`ltt serve` refuses what it can before Ray starts and before the model is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.cli.app import main
from llm_training_toolkit.commands.serve import ServerPlan, prepare_server
from llm_training_toolkit.serving.settings import ServingSettings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory that says that it holds a Qwen3, without weights: loading it would fail."""
    directory = tmp_path / "my-run" / "export"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    return directory


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and standard error of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["ltt", "serve", *map(str, arguments)])
    monkeypatch.delenv("LTT_SERVE_KEY", raising=False)
    said = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(said):
        main()
    return int(str(ended.value.code)), said.getvalue()


def test_a_taken_port_is_said_before_the_model_loads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, said = refused(monkeypatch, model, "--port", port)
    assert code == 1
    assert f"--port {port}" in said


def test_another_family_a_missing_model_and_an_open_door_are_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refused(monkeypatch, model.parent / "none")[0] == 1
    code, said = refused(monkeypatch, model, "--no-key", "--host", "0.0.0.0")
    assert (code, "--no-key" in said) == (2, True)
    assert refused(monkeypatch, model, "--key", "ключ")[0] == 2
    assert refused(monkeypatch, model, "--key", "k", "--no-key")[0] == 2
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    code, said = refused(monkeypatch, model)
    assert (code, "llama" in said) == (2, True)


def test_missing_packages_are_named_with_the_line_that_installs_them(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else find(name))
    code, said = refused(monkeypatch, model)
    assert (code, "pip install 'llm-training-toolkit[serve]'" in said) == (2, True)


def test_a_key_is_made_and_the_name_is_that_of_the_run(model: Path) -> None:
    plans = [
        prepare_server(ServingSettings(str(model), ""), host="127.0.0.1", port=0, without_key=False) for _ in range(2)
    ]
    keys = {plan.settings.key for plan in plans}
    assert len(keys) == 2
    assert all(key is not None and len(key) == 32 for key in keys)
    assert plans[0].settings.name == "my-run"
    assert all(plan.port > 0 for plan in plans)
    assert ServerPlan(ServingSettings(str(model), "m"), "::", 80).url == "http://[::1]:80"
    shown = ServerPlan(ServingSettings(str(model), "m", key="a/b"), "::1", 80)
    assert shown.to_json() == {"url": "http://[::1]:80/v1", "key": "a/b", "model": "m"}
    assert "page      http://[::1]:80/#key=a%2Fb" in shown.format_lines()
