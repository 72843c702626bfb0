"""`ltt doctor`: every check answers, and an address that does not answer is found."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_training_toolkit.commands.doctor import MachineCheck, check_whole_machine, format_checks


@pytest.fixture
def listening() -> Iterator[int]:
    """A port on which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def found(runs: Path) -> dict[str, MachineCheck]:
    return {check.name: check for check in check_whole_machine(runs)}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_every_check_answers_and_this_machine_can_train(tmp_path: Path) -> None:
    checks = found(tmp_path / "absent" / "runs")
    assert {"python", "packages", "processors", "bf16 on CPU", "compiler", "disk", "file locks", "Ray", "hub"} <= set(
        checks
    )
    assert not [check for check in checks.values() if check.state == "failed" and not check.name.startswith("GPU")]
    assert not (tmp_path / "absent").exists(), "a check writes nothing"
    lines = format_checks(list(checks.values()))
    assert len(lines) == len(checks) + sum(bool(check.fix) for check in checks.values())


def test_cluster_that_does_not_answer_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert found(tmp_path)["Ray"].state == "ok"
    check = found(tmp_path)["Ray"]
    assert check.state == "failed"
    assert str(port) in check.found
    assert check.fix


def test_hub_is_asked_unless_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listening: int) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening}")
    assert found(tmp_path)["hub"].state == "ok"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert found(tmp_path)["hub"].state == "warning"
