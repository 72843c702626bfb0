"""`ltt evaluate`: runs a task on a model and records the results in the model's run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.records import EvalRecord, format_jsonl, write_eval_record
from llm_training_toolkit.evaluation.run_tasks import run_task
from llm_training_toolkit.evaluation.table import format_metric_value
from llm_training_toolkit.evaluation.task import EvalResult, make_task
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.metrics import TensorBoard
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory


@dataclass(frozen=True)
class EvaluateRequest:
    """Arguments of `ltt evaluate`; `settings` holds only the given ones."""

    model: RunDirectory | None
    task: str
    settings: Mapping[str, Any]
    device: str = "auto"
    context: int | None = None
    details: Path | None = None


def run_evaluation(request: EvaluateRequest, console: Console) -> EvalRecord:
    """Run the task; record the results in the run if the model comes from one."""
    task = make_task(request.task, request.settings)
    subject = None
    if request.model is not None:
        subject = EvalModel(
            request.model.path, storage=request.model.storage, device=request.device, context=request.context
        )
    measured = run_task(task, subject, console.update_stage)
    for note in measured.notes:
        console.print_line(f"note: {note}", style="yellow")
    if request.details is not None:
        write_atomically(request.details, format_jsonl(measured.items))
    return record_evaluation(task.name, measured, subject, console)


def record_evaluation(task: str, measured: EvalResult, subject: EvalModel | None, console: Console) -> EvalRecord:
    """Record the results in the model's run, as a file and as TensorBoard points."""
    origin = subject.origin if subject is not None else None
    where = subject.directory if subject is not None else None
    if origin is None:
        return EvalRecord.from_result(task, measured, where, None, None)
    evaluation = EvalRecord.from_result(task, measured, where, origin.directory.name, origin.step)
    written = write_eval_record(origin.directory, evaluation, measured.items)
    console.print_line(f"kept in {origin.directory.storage.get_uri(written)}", style="dim")
    _write_tensorboard_points(origin.directory, evaluation)
    return evaluation


def _write_tensorboard_points(run: RunDirectory, evaluation: EvalRecord) -> None:
    """Write to a separate directory: the run may still train, and TensorBoard reads only the newest file of one."""
    points = TensorBoard(run.evaluations_dir / "tb", resumed_step=None)
    points.write(evaluation.step or 0, evaluation.to_metrics())
    points.close()


def format_evaluation(evaluation: EvalRecord) -> list[str]:
    """Format an evaluation for the terminal."""
    of = f" of {evaluation.run} at step {evaluation.step:,}" if evaluation.run is not None else ""
    width = max(map(len, evaluation.figures))
    rows = [f"  {name:<{width}}  {format_metric_value(name, value)}" for name, value in evaluation.figures.items()]
    return [f"{evaluation.task}{of}, on {evaluation.data}", *rows]
