"""Tool calls: a model that knows one writes it, and each way to be wrong is counted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from known_model import CALLING, TOOL, TOOL_TEMPLATE
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, ToolCallsTask
from llm_training_toolkit.evaluation.tool_calls import find_call_fault, measure_tool_calls


@pytest.fixture
def calling_model(known_model: Path, tmp_path: Path) -> Path:
    """The known model with the template that its call was learnt in."""
    directory = tmp_path / "model"
    shutil.copytree(known_model, directory)
    (directory / "chat_template.jinja").write_text(TOOL_TEMPLATE)
    return directory


def measured(model: Path, records: list[dict[str, Any]], **settings: Any) -> EvalResult:
    data = model.parent / "calls.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    subject = EvalModel(model, device="cpu")
    return measure_tool_calls(ToolCallsTask(data=str(data), **settings), subject, lambda _stage, _done, _total: None)


def test_a_model_that_knows_the_call_writes_it(calling_model: Path) -> None:
    narrow = {"type": "function", "function": {"name": "area", "parameters": {"maxProperties": 1}}}
    other = {"role": "user", "content": "¿Qué tal, número siete?"}
    found = measured(
        calling_model,
        [CALLING, CALLING | {"tools": [narrow]}, CALLING | {"messages": [other, CALLING["messages"][1]]}],
    )
    figures = found.figures
    assert figures["turns"] == 3
    assert figures["bad_arguments"] >= 1
    (known,) = [item for item in found.items if item["fault"] is None]
    assert json.loads(known["written"].removeprefix("<tool_call>").removesuffix("</tool_call>")) == known["wanted"][0]
    assert figures["valid"] == pytest.approx(1 / 3)
    assert sum(figures[fault] for fault in ("no_call", "malformed", "unknown_tool", "bad_arguments")) == 2


def test_what_cannot_be_measured_is_said(calling_model: Path) -> None:
    with pytest.raises(DataError, match="no conversation has `tools` and a turn"):
        measured(calling_model, [{"messages": CALLING["messages"]}])
    with pytest.raises(DataError, match=r"no conversation fits with 96 new tokens"):
        measured(
            calling_model, [CALLING | {"messages": [{"role": "user", "content": "a b " * 99}, CALLING["messages"][1]]}]
        )
    (calling_model / "chat_template.jinja").write_text(TOOL_TEMPLATE.replace("tool_call>", "call>"))
    with pytest.raises(DataError, match=r"writes a call in another form than <tool_call>"):
        measured(calling_model, [CALLING])


ANSWERS: dict[str, str | None] = {
    '<tool_call>\n{"name": "area", "arguments": {"width": 2, "height": 3}}\n</tool_call>': None,
    'Let me see.\n<tool_call>{"arguments": {"height": 3, "width": 2, "unit": "m"}, "name": "area"}</tool_call>': None,
    "6": "no_call",
    '<tool_call>{"name": "area", "arguments": {"width": 2, "height": 3}': "malformed",
    '<tool_call>{"name": "area", "arguments": {"width": 2, "height": 3}}': "malformed",
    '<tool_call>{"name": "area", "arguments": {"width": 2, }}</tool_call>': "malformed",
    '<tool_call>["area"]</tool_call>': "malformed",
    '<tool_call>{"arguments": {}}</tool_call>': "malformed",
    '<tool_call>{"name": "area", "arguments": "{}"}</tool_call>': "malformed",
    '<tool_call>{"name": "aera", "arguments": {"width": 2, "height": 3}}</tool_call>': "unknown_tool",
    '<tool_call>{"name": "area", "arguments": {"width": "2", "height": 3}}</tool_call>': "bad_arguments",
    '<tool_call>{"name": "area", "arguments": {"width": 2}}</tool_call>': "bad_arguments",
    '<tool_call>{"name": "area", "arguments": {"width": 2, "height": 3}}</tool_call><tool_call>x</tool_call>': (
        "malformed"
    ),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_faults_of_calls(answer: str) -> None:
    assert find_call_fault(answer, [json.dumps(TOOL)]) == ANSWERS[answer]


def test_tools_of_other_forms() -> None:
    call = '<tool_call>{"name": "area", "arguments": {"a": 1}}</tool_call>'
    assert find_call_fault(call, [json.dumps(TOOL["function"])]) == "bad_arguments"
    assert find_call_fault(call, ['{"name": "area"}']) is None
    assert find_call_fault(call, ['{"name": "area", "parameters": {"type": "any"}}']) is None


UNCHECKABLE: list[Any] = [
    {"$ref": "#/$defs/absent"},
    {"$ref": "https://example.com/schema.json"},
    {"$ref": "#"},
    {"$schema": ["list"]},
    {"$schema": 5},
    {"$id": "http://[half", "$ref": "a"},
]


@pytest.mark.parametrize("schema", UNCHECKABLE, ids=json.dumps)
def test_a_schema_that_cannot_be_checked_checks_the_name_alone(schema: Any) -> None:
    tools = [json.dumps({"name": "area", "parameters": schema}), '{"function": 5}', '{"name": ["list"]}']
    call = '<tool_call>{"name": "%s", "arguments": {"a": 1}}</tool_call>'
    assert find_call_fault(call % "area", tools) is None
    assert find_call_fault(call % "aera", tools) == "unknown_tool"
