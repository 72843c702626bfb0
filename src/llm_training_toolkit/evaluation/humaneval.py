"""Task `humaneval`: the model completes functions, tests decide, pass@k counts.

The prompts, the program that a test makes of a completion and the estimator are those of Chen et al. 2021, the texts
that end a completion those of StarCoder's evaluation.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from statistics import fmean
from typing import Any, get_args

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.decoding import Writing, write
from llm_training_toolkit.evaluation.documents import where
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.problems import Problem, read_completions, read_problems
from llm_training_toolkit.evaluation.result import Measured, Progress
from llm_training_toolkit.evaluation.settings import HumanEval
from llm_training_toolkit.sandbox.containment import containment, in_words
from llm_training_toolkit.sandbox.running import End, Ended, Kind, Limits, run_all

STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
_KS = (1, 10, 100)
_NO_ROOM = "no room"
"""How a completion ended that was never written, because its prompt fills the context."""


_Pairs = Sequence[tuple[Problem, Sequence[str | None]]]
"""Problems with their completions; None for one that found no room in the context."""


def measure_humaneval(task: HumanEval, subject: Subject | None, progress: Progress) -> Measured:
    """Score completions of every problem: given ones, or the model's.

    Raises LaunchError where programs cannot be contained, before the model writes any.
    """
    if task.samples > 1 and task.temperature == 0.0:
        raise PlanError("--samples without --temperature: all samples would be the same; 0.2 and 0.8 are usual")
    every = read_problems(task.data)
    problems = every[: task.limit]
    kind = containment(unsafe=task.unsafe)
    if task.completions is not None:
        pairs: _Pairs = list(zip(problems, read_completions(task.completions, every, task.limit), strict=True))
        settings: dict[str, Any] = {"completions": where(task.completions)}
    elif subject is not None:
        pairs = list(zip(problems, _completions(task, subject, problems, progress), strict=True))
        settings = {name: getattr(task, name) for name in ("samples", "temperature", "tokens", "seed")}
        settings["context"] = subject.context
    else:
        raise PlanError("--task humaneval: name a model, or a file of completions with --completions")
    items = _run(task, kind, pairs, progress)
    settings |= {"limit": task.limit, "timeout": task.timeout, "contained_by": in_words(kind)}
    without_room = sum(item["end"] == _NO_ROOM for item in items)
    note = f"{without_room} of {len(items)} prompts fill the context, so nothing was written: counted as not solved"
    return Measured(
        _figures(pairs, items),
        where(task.data) if task.data is not None else "HumanEval",
        settings,
        [note] if without_room else [],
        items,
    )


def _completions(
    task: HumanEval, subject: Subject, problems: Sequence[Problem], progress: Progress
) -> list[list[str | None]]:
    """What the model writes for each problem."""
    prompts = [subject.encoder.encode(problem.prompt) for problem in problems]
    asked = [prompt for prompt in prompts if len(prompt) < subject.context for _ in range(task.samples)]
    how = Writing(task.tokens, STOPS, task.temperature, task.seed, task.batch)
    answers = iter(write(subject, asked, how, lambda done: progress("completions", done, len(asked))))
    return [
        [next(answers).text if len(prompt) < subject.context else None for _ in range(task.samples)]
        for prompt in prompts
    ]


def _run(task: HumanEval, kind: Kind, pairs: _Pairs, progress: Progress) -> list[dict[str, Any]]:
    """Every completion with how its program ended."""
    each = [(problem, completion) for problem, completions in pairs for completion in completions]
    programs = [problem.program(completion) for problem, completion in each if completion is not None]
    jobs = task.jobs or len(os.sched_getaffinity(0))
    limits = Limits(seconds=task.timeout)
    ends = iter(run_all(programs, kind, limits, jobs, lambda done: progress("programs", done, len(programs))))
    return [_item(problem, completion, next(ends) if completion is not None else None) for problem, completion in each]


def _figures(pairs: _Pairs, items: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """pass@k for as many k as there are completions, and how the programs ended."""
    ends = Counter(item["end"] for item in items)
    right = Counter(item["task_id"] for item in items if item["end"] == "passed")
    counts = [(len(completions), right[problem.task_id]) for problem, completions in pairs]
    fewest = min(number for number, _ in counts)
    return {
        **{f"pass@{k}": fmean(pass_at_k(n, c, k) for n, c in counts) for k in _KS if k <= fewest},
        "problems": len(pairs),
        **{end.replace(" ", "_"): ends[end] for end in (*get_args(End), _NO_ROOM)},
    }


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that of k completions drawn from `samples`, of which `right` are right, at least one is.

    1 - C(samples - right, k) / C(samples, k), in whole numbers: the estimator of Chen et al. 2021, which has no bias.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def _item(problem: Problem, completion: str | None, ended: Ended | None) -> dict[str, Any]:
    end, error = (ended.end, ended.error) if ended is not None else (_NO_ROOM, "")
    return {"task_id": problem.task_id, "completion": completion, "end": end, "error": error}
