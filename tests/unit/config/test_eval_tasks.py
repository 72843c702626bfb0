"""Tasks of `eval.tasks`: what goes with which, and what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config import Config, dump_config_json, parse_config
from llm_training_toolkit.config.load import parse_config_json
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.evaluation.task import make_task
from llm_training_toolkit.plan import make_plan


def config(tasks: list[dict[str, Any]], **sections: Any) -> Config:
    data: dict[str, Any] = {
        "run": {"name": "a"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "t"},
        "data": {"sequence_length": 128, "sources": [{"path": "x", "format": "code"}]},
        "train": {"steps": 1},
        "eval": {"tasks": tasks},
    }
    return parse_config(data | sections, "a.yaml")


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"task": "perplexity", "limit": 3}, "limit: not for task perplexity"),
        ({"task": "infill", "samples": 2, "temperature": 0.2}, "samples and temperature: not for task infill"),
        ({"task": "humaneval", "format": "code"}, "format: not for task humaneval"),
        ({"task": "humaneval", "samples": 10}, "samples are all the same without a temperature"),
        ({"task": "humaneval", "shots": 1}, "shots: not for task humaneval"),
        ({"task": "mbpp"}, "task mbpp needs `data`"),
        ({"task": "mmlu"}, "eval.tasks.0.task"),
    ],
)
def test_what_a_task_does_not_know_is_refused(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        config([task])
    assert said in str(raised.value)


def test_what_is_accepted_makes_a_task_and_is_read_again() -> None:
    given: list[dict[str, Any]] = [
        {"task": "perplexity", "data": "b", "format": "text"},
        {"task": "infill", "limit": 3},
        {"task": "humaneval", "samples": 10, "temperature": 0.8, "limit": 2, "form": "chat"},
        {"task": "mbpp", "data": "mbpp.jsonl", "shots": 0, "split": "all"},
        {"task": "tool_calls", "data": "c", "limit": 4},
    ]
    read = config(given)
    made = [make_task(asked.task, asked.get_task_options()) for asked in read.eval.tasks]
    assert [task.name for task in made] == ["perplexity", "infill", "humaneval", "mbpp", "tool_calls"]
    assert parse_config_json(dump_config_json(read)) == read


def test_tasks_need_the_export() -> None:
    found = make_plan(config([{"task": "infill"}], export={"at_end": False})).problems
    assert [problem.where for problem in found] == ["eval.tasks"]
    assert not make_plan(config([{"task": "infill"}])).problems


def test_tool_calls_need_conversations() -> None:
    (found,) = make_plan(config([{"task": "tool_calls"}])).problems
    assert (found.code, found.where) == ("tool-calls-without-conversations", "eval.tasks[0].data")
    assert not make_plan(config([{"task": "tool_calls", "data": "c"}])).problems
    chat = {"sequence_length": 128, "sources": [{"path": "x", "format": "chat"}]}
    assert not make_plan(config([{"task": "tool_calls"}], data=chat)).problems


def test_what_no_model_of_the_family_can_do_is_a_problem() -> None:
    chat = make_plan(config([{"task": "infill", "format": "chat"}])).problems
    assert [problem.where for problem in chat] == ["eval.tasks[0].format"]
    tasks: list[dict[str, Any]] = [{"task": "perplexity"}, {"task": "infill"}]
    without = make_plan(config(tasks, model={"name": "qwen2-0.5b"})).problems
    assert [problem.where for problem in without] == ["eval.tasks[1]"]


def test_what_a_task_needs_and_is_not_here_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there.jsonl").touch()
    names = ["~/there.jsonl", "~/gone.jsonl", "s3://bucket/problems", "code/*.py", "python:stdlib"]
    noted = make_plan(config([{"task": "perplexity", "data": name} for name in names])).notes
    assert [note for note in noted if note.startswith("eval.tasks")] == [
        "eval.tasks: perplexity needs ~/gone.jsonl, which is not here."
    ]
