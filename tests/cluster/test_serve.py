"""`ltt serve` on a Ray of its own: answers of the model, twenty clients, and an end that leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

import fork_server
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.models.sampling import SamplingParams
from ray_workers import environment_with_forked_workers
from served import save_tiny_model

PREFIX, SUFFIX = "def area(width, height):\n", "\n    return area\n"
HOW = SamplingParams(max_new_tokens=12)


@pytest.fixture(scope="module")
def environment() -> Iterator[Mapping[str, str]]:
    """The environment of a command that starts Ray itself and forks its workers."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with environment_with_forked_workers(plain | {"RAY_AUTH_MODE": "token"}) as extended:
        yield extended


def start(model: Path, environment: Mapping[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llm_training_toolkit", "serve", str(model), "--port", "0", "--json", *options]
    return fork_server.popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_server_answers_many_clients_and_leaves_nothing_behind(tmp_path: Path, environment: Mapping[str, str]) -> None:
    generator = TextGenerator.from_directory(save_tiny_model(tmp_path / "tiny"))
    with start(tmp_path / "tiny", environment, "--max-tokens", "400") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()
        said = json.loads(line)
        processes = psutil.Process(process.pid).children(recursive=True)
        assert any(each.name() == "raylet" for each in processes)
        client = openai.OpenAI(base_url=said["url"], api_key=said["key"], max_retries=0)

        def complete(**fields: Any) -> Any:
            return client.completions.create(**{"model": "tiny", "max_tokens": 12, "temperature": 0, **fields})

        assert [model.id for model in client.models.list()] == [said["model"]] == ["tiny"]
        filled = generator.fill_middle(PREFIX, SUFFIX, HOW).text
        assert complete(prompt=PREFIX, suffix=SUFFIX).choices[0].text == filled
        pieces = [chunk.choices[0].text for chunk in complete(prompt=PREFIX, suffix=SUFFIX, stream=True)]
        assert "".join(pieces) == filled
        assert len(pieces) > 3
        prompts = [f"{PREFIX}    # {'x' * number}\n" for number in range(20)]
        with ThreadPoolExecutor(20) as clients:
            answers = clients.map(lambda prompt: complete(prompt=prompt).choices[0].text, prompts)
            assert list(answers) == [generator.complete_prompt(prompt, HOW).text for prompt in prompts]
        with pytest.raises(openai.AuthenticationError) as raised:
            client.with_options(api_key="other").models.list()
        assert raised.value.code == "invalid_api_key"
        with pytest.raises(openai.BadRequestError) as refused:
            complete(prompt="a b " * 600)
        assert refused.value.code == "context_length_exceeded"
        with complete(prompt=PREFIX, max_tokens=400, stream=True) as chunks:
            next(iter(chunks))
        assert complete(prompt=PREFIX).usage.completion_tokens == 12
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert_gone(processes)
    with socket.create_server(("127.0.0.1", int(said["url"].split(":")[2].removesuffix("/v1")))):
        pass
