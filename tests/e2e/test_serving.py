"""The server with a model that knows its answers by heart: the end of a turn, a tool call, an infilled gap."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from known_model import ANSWER, CALLING, KNOWN, QUESTION, TOOL, TOOL_TEMPLATE
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.evaluation.infill import draw_gap
from served import Served, serve_in_thread


@pytest.fixture
def calling_model(known_model: Path, tmp_path: Path) -> Path:
    """The known model with the short template of its tool call."""
    directory = shutil.copytree(known_model, tmp_path / "calling")
    (directory / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return directory


@pytest.fixture
def served(calling_model: Path) -> Iterator[Served]:
    with serve_in_thread(calling_model) as server:
        yield server


def test_a_call_is_an_object_whole_and_streamed(served: Served) -> None:
    asked: Any = {"model": "tiny", "messages": CALLING["messages"][:1], "tools": [TOOL], "temperature": 0}
    create = served.client.chat.completions.create
    whole = create(**asked).choices[0]
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", None)
    [call] = whole.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("area", {"width": 2, "height": 3})
    chunks = [chunk.choices[0] for chunk in create(stream=True, **asked)]
    [streamed] = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert (streamed.index, streamed.function.model_dump()) == (0, call.function.model_dump())
    assert chunks[-1].finish_reason == "tool_calls"
    text = create(**asked | {"tools": None}).choices[0]
    assert text.finish_reason != "tool_calls"


def test_a_turn_and_a_gap_end_where_training_ended_them(known_model: Path) -> None:
    gap = draw_gap(Document(0, "area.py", KNOWN), "line", seed=0)
    assert gap is not None
    with serve_in_thread(known_model) as served:
        asked: Any = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        answer = served.client.chat.completions.create(model="tiny", **asked).choices[0]
        assert (answer.message.content, answer.finish_reason) == (ANSWER, "stop")
        filled = served.client.completions.create(
            model="tiny", prompt=gap.prefix, suffix=gap.suffix, max_tokens=64, temperature=0
        ).choices[0]
        assert (filled.text, filled.finish_reason) == (gap.middle, "stop")
