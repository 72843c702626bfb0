"""A tiny model with random weights behind a real HTTP server in this process, and OpenAI's client for it."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import openai
import torch
import uvicorn
from transformers import GenerationConfig

from llm_training_toolkit import families
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.models import build_model
from llm_training_toolkit.serving.app import build_app
from llm_training_toolkit.serving.served_model import ServedModel
from llm_training_toolkit.serving.settings import ServingLimits, ServingSettings
from tiny_models import DECODER

CONTEXT = 512
KEY = "key-of-a-test"
SHAPE: dict[str, Any] = DECODER | {
    "tie_word_embeddings": False,
    "max_position_embeddings": CONTEXT,
}
TEXT = "def area(width, height):\n    return width * height\n<tool_call> # Tools You may call one or more functions\n"


def save_tiny_model(directory: Path, size: str = "qwen3-0.6b", *, template: bool = True) -> Path:
    """Write a model directory whose likeliest token is never special: greedy answers are as long as was asked."""
    family = families.find_size(size).family
    train_tokenizer([TEXT] * 2, 512, TokenizationSpec.from_family(family), directory)
    if template:
        (directory / "chat_template.jinja").write_text(family.chat_template)
    torch.manual_seed(0)
    encoder = open_tokenizer(str(directory))
    model: Any = build_model(SHAPE | {"vocab_size": encoder.vocab_size}, precision="fp32", attention="sdpa")
    special = list(map(encoder.get_special_token_id, filter(encoder.has_special_token, family.special_tokens.all)))
    with torch.no_grad():
        model.lm_head.weight[special] = 0
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(directory)
    return directory


class Gate:
    """Holds generation before its next token, so that no test depends on the speed of the machine."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._is_open, self._permitted = True, 0
        self.reached = threading.Event()
        """Set once generation has begun."""

    def close(self, permitted: int = 0) -> None:
        """Hold generation, after so many tokens."""
        with self._change:
            self._is_open, self._permitted = False, permitted

    def open(self) -> None:
        with self._change:
            self._is_open = True
            self._change.notify_all()

    def pass_through(self, *_: object) -> None:
        with self._change:
            self.reached.set()
            self._change.wait_for(lambda: self._is_open or self._permitted > 0)
            self._permitted -= 1


@dataclass
class Served:
    """A running server."""

    generator: TextGenerator
    url: str
    gate: Gate = field(default_factory=Gate)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def health(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.url}/health") as response:
            state: dict[str, Any] = json.load(response)
        return state

    def wait_for_requests(self, count: int, seconds: float = 300) -> None:
        """Wait until `count` requests are generated for or in the queue."""
        end = time.monotonic() + seconds
        while (state := self.health())["running"] + state["waiting"] < count:
            assert time.monotonic() < end, state
            time.sleep(0.02)


@contextmanager
def serve_in_thread(directory: Path, limits: ServingLimits | None = None, *, key: str | None = KEY) -> Iterator[Served]:
    """Serve a model directory under the name `tiny` on a free port of this process."""
    settings = ServingSettings(str(directory), "tiny", device="cpu", key=key, limits=limits or ServingLimits())
    model = ServedModel.open(settings)
    server = uvicorn.Server(uvicorn.Config(build_app(model, settings), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    served = Served(model.generator, f"http://127.0.0.1:{port}")
    model.generator.model.register_forward_pre_hook(served.gate.pass_through)
    try:
        yield served
    finally:
        served.gate.open()
        server.should_exit = True
        thread.join()
