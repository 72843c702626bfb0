"""Verb `evaluate`, in its own file because its tasks have many settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.task import (
    CodePromptForm,
    CodeTestTask,
    DocumentFormat,
    GapContext,
    GapKind,
    MbppSplit,
    format_setting_default,
    make_task,
)
from llm_training_toolkit.runs.directory import RunDirectory, find_model_directory
from llm_training_toolkit.runs.storage.open import open_path

TaskName = Literal["perplexity", "infill", "humaneval", "mbpp", "tool_calls"]


def _build_task_option(name: str, text: str, **limits: Any) -> Any:  # noqa: ANN401 - as typer takes them
    """Build an option that some tasks have; if omitted, the task's default applies."""
    return typer.Option(f"--{name}", help=text, show_default=format_setting_default(name) or False, **limits)


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="An exported run, or an exported directory; a path or the URI of a run.",
        show_default=False,
    ),
]
Data = Annotated[
    str | None,
    _build_task_option(
        "data", "Documents or problems: a file, directory, glob. Default: held-out documents; HumanEval."
    ),
]
Stride = Annotated[int | None, _build_task_option("stride", "perplexity: tokens between overlapping windows.", min=1)]
Given = Annotated[GapContext | None, _build_task_option("given", "infill: what the model sees of the document.")]
Limit = Annotated[int | None, _build_task_option("limit", "All but perplexity: documents, problems.", min=1)]
Tokens = Annotated[int | None, _build_task_option("tokens", "Most new tokens of an answer.", min=1)]
Batch = Annotated[int | None, _build_task_option("batch", "Sequences or answers at a time.", min=1)]
PromptForm = Annotated[
    CodePromptForm | None, _build_task_option("form", "humaneval, mbpp: text to continue, or a question to answer.")
]
Shots = Annotated[int | None, _build_task_option("shots", "mbpp: examples in the prompt.", min=0, max=3)]
Split = Annotated[MbppSplit | None, _build_task_option("split", "mbpp: published test split, or every problem.")]
Samples = Annotated[int | None, _build_task_option("samples", "humaneval, mbpp: completions of each problem.", min=1)]
Temperature = Annotated[float | None, _build_task_option("temperature", "humaneval, mbpp: 0 = the likeliest.", min=0.0)]
Completions = Annotated[str | None, _build_task_option("completions", "humaneval, mbpp: a file to score, no model.")]
Timeout = Annotated[float | None, _build_task_option("timeout", "humaneval, mbpp: seconds of a program.", min=0.1)]
Jobs = Annotated[int | None, _build_task_option("jobs", "humaneval, mbpp: programs at a time. Default: cores.", min=1)]
Unsafe = Annotated[
    bool, typer.Option("--unsafe", help="humaneval, mbpp: run programs without a sandbox where this machine has none.")
]
ContextLength = Annotated[
    int | None,
    typer.Option(min=2, help="Context length in tokens. Default: that of its run, or the model's.", show_default=False),
]
Details = Annotated[
    Path | None, typer.Option(help="File for every gap or completion, as JSON lines.", show_default=False)
]


def evaluate(
    models: Models = None,
    *,
    task: Annotated[TaskName | None, typer.Option(help="Task.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare the stored results of the given runs.")] = False,
    data: Data = None,
    form: Annotated[DocumentFormat | None, _build_task_option("format", "Of the documents.")] = None,
    stride: Stride = None,
    middle: Annotated[GapKind | None, _build_task_option("middle", "infill: what is cut out.")] = None,
    given: Given = None,
    limit: Limit = None,
    tokens: Tokens = None,
    batch: Batch = None,
    seed: Annotated[int | None, _build_task_option("seed", "Of gaps and samples.")] = None,
    prompt_form: PromptForm = None,
    shots: Shots = None,
    split: Split = None,
    samples: Samples = None,
    temperature: Temperature = None,
    completions: Completions = None,
    timeout: Timeout = None,
    jobs: Jobs = None,
    unsafe: Unsafe = False,
    context: ContextLength = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto = a GPU if present.")] = "auto",
    details: Details = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Evaluate a model: perplexity, infilling, HumanEval, MBPP, calls of tools. Results are stored in its run."""
    options: dict[str, Any] = {
        "data": data,
        "format": form,
        "stride": stride,
        "middle": middle,
        "given": given,
        "limit": limit,
        "tokens": tokens,
        "batch": batch,
        "seed": seed,
        "form": prompt_form,
        "shots": shots,
        "split": split,
        "samples": samples,
        "temperature": temperature,
        "completions": completions,
        "timeout": timeout,
        "jobs": jobs,
        "unsafe": unsafe or None,
    }
    if compare:
        _compare_runs(models or [], as_json=as_json)
    elif task is None or len(models or []) > 1:
        raise typer.BadParameter("give one MODEL and a --task, or several runs with --compare")
    else:
        settings = {name: value for name, value in options.items() if value is not None}
        _evaluate_model(models, task, settings, device=device, context=context, details=details, as_json=as_json)


def _evaluate_model(
    models: list[str] | None,
    task: TaskName,
    settings: Mapping[str, Any],
    *,
    device: str,
    context: int | None,
    details: Path | None,
    as_json: bool,
) -> None:
    """Run the task on the model, if one is given, and print the result."""
    with open_path(models[0], export=True) if models else nullcontext(None) as model:
        _check_evaluate_options(task, settings, model)
        from llm_training_toolkit.commands.evaluate import EvaluateRequest, format_evaluation, run_evaluation
        from llm_training_toolkit.monitoring.console import Console

        console = Console(sys.stderr)
        try:
            evaluation = run_evaluation(EvaluateRequest(model, task, settings, device, context, details), console)
        finally:
            console.close()
    typer.echo(json.dumps(evaluation.to_json()) if as_json else "\n".join(format_evaluation(evaluation)))


def _check_evaluate_options(task: TaskName, settings: Mapping[str, Any], model: RunDirectory | None) -> None:
    """Check the options before the heavy imports."""
    wanted = make_task(task, settings)
    if model is not None:
        find_model_directory(model.path)
    elif not isinstance(wanted, CodeTestTask) or wanted.completions is None:
        raise PlanError(f"--task {task}: name a model, an exported directory or a run")


def _compare_runs(runs: list[str], *, as_json: bool) -> None:
    from llm_training_toolkit.cli.tables import print_tables
    from llm_training_toolkit.evaluation.table import build_eval_tables, collect_eval_records

    with ExitStack() as stack:
        found = collect_eval_records([stack.enter_context(open_path(run)) for run in runs])
    if as_json:
        typer.echo(json.dumps([evaluation.to_json() for evaluation in found]))
    else:
        print_tables(*build_eval_tables(found))
