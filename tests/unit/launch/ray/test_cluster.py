"""A head or raylet that is gone is said before Ray ends the process without a word; one that answers is left alone."""

from __future__ import annotations

import socket
import threading

import pytest

from llm_training_toolkit.launch.ray.cluster import watch_head, watch_raylet
from llm_training_toolkit.setup.machine import RAY_HEAD_TIMEOUT_VARIABLE


def test_a_head_that_is_gone_ends_the_run_in_words_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAY_HEAD_TIMEOUT_VARIABLE, "2")
    said: list[str] = []
    ended = threading.Event()

    def end(why: str) -> None:
        said.append(why)
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with watch_head(address, said.append, end):
            assert not ended.wait(2.5), "it answers"
            assert not said
            head.close()
            assert ended.wait(10)
    warning, why = said
    assert warning == f"the head of the Ray cluster ({address}) does not answer; the run waits 2 s for it"
    assert why.startswith(f"the head of the Ray cluster ({address}) is gone: it has not answered for ")


def test_a_raylet_that_is_gone_ends_the_run_in_words() -> None:
    said: list[str] = []
    ended = threading.Event()

    def end(why: str) -> None:
        said.append(why)
        ended.set()

    with socket.create_server(("127.0.0.1", 0)) as raylet:
        address = f"127.0.0.1:{raylet.getsockname()[1]}"
        with watch_raylet(address, end):
            assert not ended.wait(1.5), "it answers"
            raylet.close()
            assert ended.wait(10)
    assert said == [f"Ray's process on this node (raylet, {address}) is gone: killed from outside, or crashed"]
