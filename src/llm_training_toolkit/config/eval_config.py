"""Configuration of the evaluation: held-out loss, and tasks with their options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_training_toolkit.config.section import MAX_COUNT, ConfigSection, FieldTag, Location


class EvalTaskConfig(ConfigSection):
    """Evaluation task. Absent fields have the defaults of `ltt evaluate`."""

    task: Annotated[Literal["perplexity", "infill", "humaneval", "mbpp", "tool_calls"], FieldTag.FREE]
    """Loss of documents, infilling of gaps in code, functions with unit tests (humaneval, mbpp), or calls of tools that
    fit their schemas (docs/evaluation.md)."""
    interval: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """Steps between evaluations of checkpoints during training; all workers wait. Absent = only at the end."""
    data: Annotated[Location | None, FieldTag.FREE] = None
    """Documents, or a file of problems. Absent = the held-out documents; for humaneval its package's 164 problems; mbpp
    needs a file."""
    format: Annotated[Literal["code", "text", "chat"] | None, FieldTag.FREE] = None
    """Format of the documents."""
    limit: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """All but perplexity: number of documents or problems."""
    form: Annotated[Literal["completion", "chat"] | None, FieldTag.FREE] = None
    """humaneval, mbpp: continuation of a text, for base models, or an answer with a code block."""
    shots: Annotated[Annotated[int, Field(ge=0, le=3)] | None, FieldTag.FREE] = None
    """mbpp: examples in the prompt. Absent = 3."""
    split: Annotated[Literal["test", "all"] | None, FieldTag.FREE] = None
    """mbpp: the published test split, or all problems of the file but the examples. Absent = test."""
    samples: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """humaneval, mbpp: completions per problem, for pass@10 and pass@100."""
    temperature: Annotated[Annotated[float, Field(ge=0.0)] | None, FieldTag.FREE] = None
    """humaneval, mbpp: sampling temperature; 0 = greedy decoding."""

    @model_validator(mode="after")
    def _check_task_options(self) -> EvalTaskConfig:
        own = {
            "perplexity": {"format"},
            "infill": {"format", "limit"},
            "humaneval": {"form", "limit", "samples", "temperature"},
            "mbpp": {"form", "limit", "samples", "shots", "split", "temperature"},
            "tool_calls": {"limit"},
        }
        strange = [name for name in self.get_task_options() if name not in own[self.task] | {"data"}]
        if strange:
            raise ValueError(f"{' and '.join(strange)}: not for task {self.task}; remove")
        if self.samples is not None and self.samples > 1 and not self.temperature:
            raise ValueError("samples are all the same without a temperature: 0.2 and 0.8 are usual")
        if self.task == "mbpp" and self.data is None:
            raise ValueError("task mbpp needs `data`, the file of its problems")
        return self

    def get_task_options(self) -> dict[str, Any]:
        """Return the options that were given besides the task, as `ltt evaluate` takes them."""
        return self.model_dump(exclude={"task", "interval"}, exclude_none=True)


class EvalConfig(ConfigSection):
    """Evaluation of the held-out loss and of tasks."""

    interval: Annotated[int, Field(ge=1), FieldTag.FREE] = 200
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    max_sequences: Annotated[Annotated[int, Field(ge=1, le=MAX_COUNT)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Maximum number of held-out sequences per evaluation, a fixed random sample of all. `auto` = 2 % of the sequences
    trained between two evaluations, but at least 65,536 tokens."""
    tasks: tuple[EvalTaskConfig, ...] = ()
    """Tasks run on the exported model at the end, and during training at their `interval`. Failed tasks are only
    reported."""
