"""Wrong requests get OpenAI's error object with the right status; a full queue and a slow model do, too."""

from __future__ import annotations

import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from llm_training_toolkit.serving.settings import ServingLimits
from served import CONTEXT, KEY, Served, save_tiny_model, serve_in_thread

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "def area("}
CHATTED: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Area?"}]}
TOOL = {"type": "function", "function": {"name": "area", "parameters": {}}}


def post(served: Served, path: str, content: bytes, **headers: str) -> tuple[int, Any]:
    """Status and JSON of a request."""
    given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
    request = urllib.request.Request(served.url + path, content, given)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def refused(served: Served, path: str, body: object, **headers: str) -> tuple[int, str, str | None]:
    """Status, code and field of a refusal."""
    status, found = post(served, path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)
    error = found["error"]
    assert error["message"]
    assert error["type"]
    return status, error["code"], error["param"]


@pytest.mark.parametrize(
    ("path", "body", "wanted"),
    [
        (TEXT, b"{", (400, "invalid_json", None)),
        (TEXT, b"[]", (400, "invalid_json", None)),
        (TEXT, {"model": "tiny"}, (400, "missing_required_parameter", "prompt")),
        (TEXT, {**ASKED, "prompt": ""}, (400, "empty_prompt", "prompt")),
        (TEXT, {**ASKED, "prompt": "\ud800"}, (400, "invalid_value", "prompt")),
        (TEXT, {**ASKED, "max_tokens": 0}, (400, "invalid_value", "max_tokens")),
        (TEXT, {**ASKED, "max_tokens": "5"}, (400, "invalid_value", "max_tokens")),
        (TEXT, {**ASKED, "max_tokens": 1025}, (400, "max_tokens_too_large", "max_tokens")),
        (TEXT, {**ASKED, "temperature": 3}, (400, "invalid_value", "temperature")),
        (TEXT, {**ASKED, "stop": ["a"] * 5}, (400, "invalid_value", "stop")),
        (TEXT, {**ASKED, "n": 2}, (400, "unsupported_value", "n")),
        (TEXT, {**ASKED, "n": True}, (400, "unsupported_value", "n")),
        (TEXT, {**ASKED, "stream_options": {}}, (400, "invalid_value", "stream_options")),
        (TEXT, {**ASKED, "logprobs": 1}, (400, "unknown_parameter", "logprobs")),
        (TEXT, {**ASKED, "top_k": 1}, (400, "unknown_parameter", "top_k")),
        (TEXT, {**ASKED, "model": "gpt"}, (404, "model_not_found", "model")),
        (TEXT, {**ASKED, "prompt": "a b " * CONTEXT}, (400, "context_length_exceeded", "max_tokens")),
        (TEXT, {**ASKED, "prompt": "x" * 2_000_000}, (413, "request_too_large", None)),
        (CHAT, {**CHATTED, "max_tokens": 2, "max_completion_tokens": 3},
         (400, "invalid_value", "max_completion_tokens")),
        (CHAT, {**CHATTED, "messages": []}, (400, "invalid_value", "messages")),
        (CHAT, {**CHATTED, "messages": [{"role": "robot", "content": "."}]}, (400, "invalid_messages", "messages")),
        (CHAT, {**CHATTED, "messages": [{"role": "assistant", "content": "."}]}, (400, "invalid_messages", "messages")),
        (CHAT, {**CHATTED, "tools": [TOOL], "tool_choice": "required"}, (400, "invalid_value", "tool_choice")),
        (CHAT, {**CHATTED, "messages": [{"role": "user", "content": "a b " * CONTEXT}]},
         (400, "context_length_exceeded", "prompt")),
        ("/v1/nothing", ASKED, (404, "unknown_url", None)),
        ("/v1/models", ASKED, (405, "invalid_method", None)),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_its_field(
    served: Served, path: str, body: object, wanted: tuple[int, str, str | None]
) -> None:
    assert refused(served, path, body) == wanted


def test_fields_without_effect_and_defaults_are_accepted(served: Served) -> None:
    harmless = {"user": "me", "n": 1, "echo": False, "presence_penalty": 0.0, "logit_bias": None, "max_tokens": 2}
    status, found = post(served, TEXT, json.dumps({**ASKED, **harmless}).encode())
    assert (status, found["usage"]["completion_tokens"]) == (200, 2)


def test_another_key_and_none_are_refused(served: Served, model_directory: Path) -> None:
    assert refused(served, TEXT, ASKED, Authorization="Bearer other") == (401, "invalid_api_key", None)
    assert refused(served, CHAT, CHATTED, Authorization="") == (401, "invalid_api_key", None)
    with pytest.raises(openai.AuthenticationError):
        served.client.with_options(api_key="other").models.list()


def test_without_a_key_foreign_pages_are_refused(model_directory: Path) -> None:
    with serve_in_thread(model_directory, key=None) as served:
        assert post(served, TEXT, json.dumps(ASKED).encode(), Authorization="")[0] == 200
        plain = {"Content-Type": "text/plain"}  # as a foreign page may send it unasked
        assert refused(served, TEXT, ASKED, **plain) == (400, "invalid_content_type", None)
        assert refused(served, TEXT, ASKED, Host="evil.example") == (403, "foreign_host", None)
        assert post(served, TEXT, json.dumps(ASKED).encode(), Authorization="", Host="127.0.0.2:8000")[0] == 200


def test_what_the_model_cannot_do_is_refused(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path, "qwen2-0.5b", template=False)
    with serve_in_thread(plain) as served:
        assert refused(served, CHAT, CHATTED) == (400, "chat_not_supported", "messages")
        assert refused(served, TEXT, {**ASKED, "suffix": "x"}) == (400, "suffix_not_supported", "suffix")
        [model] = served.client.models.list().data
        extra: Any = model.model_extra
        assert (extra["chat"], extra["infill"], extra["tools"]) == (False, False, False)


Restrict = Callable[..., Served]


@pytest.fixture
def restricted(model_directory: Path) -> Iterator[Restrict]:
    """Serves one request at a time, with the limits that a test asks for."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda **limits: stack.enter_context(
            serve_in_thread(model_directory, ServingLimits(batch_size=1, **limits))
        )


def complete(served: Served, **fields: Any) -> Any:
    return served.client.completions.create(**{**ASKED, "max_tokens": 2, "temperature": 0, **fields})


def test_a_full_queue_is_said_at_once(restricted: Restrict) -> None:
    served = restricted(max_queued=1)
    served.gate.close()
    with ThreadPoolExecutor(2) as clients:
        try:
            first = clients.submit(complete, served)
            assert served.gate.reached.wait(300)
            second = clients.submit(complete, served, stream=True)
            served.wait_for_requests(2)
            with pytest.raises(openai.RateLimitError) as raised:
                complete(served)
        finally:
            served.gate.open()
        assert raised.value.code == "queue_full"
        assert first.result().usage.completion_tokens == 2
        assert list(second.result())[-1].choices[0].finish_reason == "length"


def test_time_is_limited_in_the_queue_and_in_the_model(restricted: Restrict) -> None:
    served = restricted(timeout=5.0)
    served.gate.close()
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(complete, served)
        assert served.gate.reached.wait(300)
        second = clients.submit(complete, served, stream=True)
        found = {error.code: error.status_code for error in (first.exception(), second.exception())}  # type: ignore[union-attr]
        served.gate.open()
    assert found == {"generation_timeout": 504, "queue_timeout": 503}


def test_time_is_limited_for_the_body(restricted: Restrict) -> None:
    served = restricted(timeout=0.1)
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.putrequest("POST", TEXT)
    for name, value in {"Authorization": f"Bearer {KEY}", "Content-Length": "10"}.items():
        connection.putheader(name, value)
    connection.endheaders()
    with connection.getresponse() as response:
        assert (response.status, json.load(response)["error"]["code"]) == (408, "request_timeout")


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_its_client_leaves(
    restricted: Restrict, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "llm_training_toolkit.serving")
    served = restricted(max_tokens=500)
    served.gate.close(permitted=20 if stream else 0)
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    body = {**ASKED, "max_tokens": 500, "temperature": 0, "stream": stream}
    connection.request("POST", TEXT, json.dumps(body), {"Authorization": f"Bearer {KEY}"})
    if stream:
        with connection.getresponse() as response:
            assert response.readline().startswith(b"data: {")
    else:
        assert served.gate.reached.wait(300)
    connection.close()
    wait_until(lambda: not served.health()["running"])  # it does not count answers that nobody waits for
    served.gate.open()

    def list_ends() -> list[str]:
        return [text for record in caplog.records if (text := record.getMessage()).startswith("answer of")]

    wait_until(lambda: bool(list_ends()))
    [end] = list_ends()
    assert end.endswith("end: cancelled")
    assert int(end.split()[2]) < 500
