"""MBPP: the published prompt and split, right completions pass, and files that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.data.chat.messages import Conversation
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.code_tasks.mbpp import MbppProblem, MbppQuestion, measure_mbpp, read_mbpp_problems
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, MbppTask

# Two prompts of Austin et al. 2021's form, written here: the file itself is not part of the repository.
GOLDEN = """\
You are an expert Python programmer, and here is your task: Write a function to double a number. \
Your code should pass these tests:

assert double(2) == 4
assert double(0) == 0
[BEGIN]
def double(x):
    return 2 * x
[DONE]

You are an expert Python programmer, and here is your task: Write a function to halve a number. \
Your code should pass these tests:

assert halve(2) == 1
[BEGIN]
"""


def row(task_id: int, name: str = "double", **fields: Any) -> dict[str, Any]:
    tests = [f"assert {name}(2) == 4", f"assert {name}(0) == 0"]
    code = f"def {name}(x):\n    return 2 * x"
    text = f"Write a function to {name} a number."
    return {"task_id": task_id, "text": text, "code": code, "test_list": tests, "test_setup_code": "", **fields}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def measured(subject: EvalModel | None = None, **settings: Any) -> EvalResult:
    task = MbppTask(**{"unsafe": True} | settings)
    return measure_mbpp(task, subject, lambda _stage, _done, _total: None)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """A file of the examples, two problems of the test split and one of training."""
    return write(tmp_path / "mbpp.jsonl", [row(number) for number in (2, 3, 4, 11, 510, 601)])


def test_the_prompt_is_the_published_one() -> None:
    shot = MbppProblem("2", "Write a function to double a number.", *SHOT)
    halve = MbppProblem("11", "Write a function to halve a number.", ("assert halve(2) == 1",), "", shots=(shot,))
    assert halve.build_prompt() == GOLDEN


SHOT = (("assert double(2) == 4", "assert double(0) == 0"), "def double(x):\n    return 2 * x")


def test_the_chat_form_has_the_examples_as_turns() -> None:
    shot = MbppQuestion("2", "Write a function to double a number.", *SHOT)
    prompt = MbppQuestion("11", "Halve.", ("assert halve(2) == 1",), "", shots=(shot,)).build_prompt()
    assert isinstance(prompt, Conversation)
    assert [message.role for message in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.messages[1].content == f"```python\n{SHOT[1]}\n```"
    assert prompt.messages[2].content.endswith("assert halve(2) == 1\n")


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, ["11", "510"]),
        ({"split": "all"}, ["11", "510", "601"]),
        ({"split": "all", "shots": 1}, ["3", "4", "11", "510", "601"]),
        ({"split": "all", "shots": 0, "limit": 2}, ["2", "3"]),
    ],
)
def test_the_split_decides_what_is_measured(
    data: str, tmp_path: Path, settings: dict[str, Any], ids: list[str]
) -> None:
    every = [{"task_id": number, "completion": row(number)["code"]} for number in (2, 3, 4, 11, 510, 601)]
    every[-2]["completion"] = "def double(x):\n    return x"
    found = measured(data=data, completions=write(tmp_path / "code.jsonl", every), **settings)
    assert [item["task_id"] for item in found.items] == ids
    right = [number for number in ids if number != "510"]
    assert found.figures["pass@1"] == pytest.approx(len(right) / len(ids))
    assert found.settings["split"] == settings.get("split", "test")


def test_answers_of_the_chat_form_are_scored_by_their_block(data: str, tmp_path: Path) -> None:
    answers = [{"task_id": number, "completion": f"Here:\n```python\n{SHOT[1]}\n```"} for number in (11, 510)]
    found = measured(data=data, form="chat", completions=write(tmp_path / "answers.jsonl", answers))
    assert found.figures["pass@1"] == 1.0


def test_the_sanitized_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sanitized-mbpp.json"
    record = row(11) | {"prompt": "Double.", "test_imports": ["import math"]}
    del record["text"], record["test_setup_code"]
    path.write_text(json.dumps([record]))
    [problem] = read_mbpp_problems(str(path))
    assert (problem.text, problem.setup.strip()) == ("Double.", "import math")
    exec(problem.build_program(problem.code), {})


def test_a_model_continues_the_prompt_up_to_the_mark(known_model: Path, data: str) -> None:
    found = measured(EvalModel(known_model, device="cpu"), data=data, tokens=8, shots=0)
    assert found.figures["problems"] == 2
    assert all("[DONE]" not in item["completion"] for item in found.items)


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([row(2, text=3)], {}, "mbpp.jsonl:1: text is missing, or no text"),
        ([row(2, test_list="assert 1")], {}, "mbpp.jsonl:1: test_list is missing, or no list"),
        ([row(2), row(2)], {}, "mbpp.jsonl:2: task_id 2 comes twice"),
        ([row(2), row(11)], {}, "the file has no 3: use --shots 0"),
        ([row(1)], {"shots": 0}, "no problem of --split test"),
        ([], {}, "holds no problem"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError) as caught:
        measured(data=write(tmp_path / "mbpp.jsonl", rows), **settings)
    assert said in str(caught.value)


def test_the_file_must_be_named() -> None:
    with pytest.raises(DataError, match="name its file with --data"):
        measured()
