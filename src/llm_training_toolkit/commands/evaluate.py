"""`ltt evaluate`: measures a model, keeps the figures in its run, and shows those of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.records import Evaluation, item_lines, keep
from llm_training_toolkit.evaluation.run_tasks import measure
from llm_training_toolkit.evaluation.table import shown
from llm_training_toolkit.evaluation.task import Measured, make_task
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.metrics import TensorBoard
from llm_training_toolkit.runs.directory import RunDirectory, write_atomically
from llm_training_toolkit.runs.storage import storage_of


@dataclass(frozen=True)
class Request:
    """What a person asked for on the command line. Of the settings only those that were given."""

    model: Path | None
    task: str
    settings: Mapping[str, Any]
    device: str = "auto"
    context: int | None = None
    details: Path | None = None


def evaluate(request: Request, console: Console) -> Evaluation:
    """Carry out the task; a model that came from a run leaves its figures there, too."""
    task = make_task(request.task, request.settings)
    subject = None
    if request.model is not None:
        subject = Subject(request.model, device=request.device, context=request.context)
    measured = measure(task, subject, console.stage)
    for note in measured.notes:
        console.say(f"note: {note}", style="yellow")
    if request.details is not None:
        write_atomically(request.details, item_lines(measured.items))
    return record(task.name, measured, subject, console)


def record(task: str, measured: Measured, subject: Subject | None, console: Console) -> Evaluation:
    """Keep the figures in the run the model came from, as a file and as points in TensorBoard."""
    origin = subject.origin if subject is not None else None
    where = subject.directory if subject is not None else None
    if origin is None:
        return Evaluation.of(task, measured, where, None, None)
    evaluation = Evaluation.of(task, measured, where, origin.run.name, origin.step)
    written = keep(origin.run, evaluation, measured.items)
    console.say(f"kept in {storage_of(written).address(written)}", style="dim")
    _points(origin.run, evaluation)
    return evaluation


def _points(run: RunDirectory, evaluation: Evaluation) -> None:
    """Into a directory of its own: TensorBoard follows the newest file of one alone, and the run may still train."""
    points = TensorBoard(run.evaluations / "tb", resumed_step=None)
    points.write(evaluation.step or 0, evaluation.metrics())
    points.close()


def lines(evaluation: Evaluation) -> list[str]:
    """An evaluation for people."""
    of = f" of {evaluation.run} at step {evaluation.step:,}" if evaluation.run is not None else ""
    width = max(map(len, evaluation.figures))
    rows = [f"  {name:<{width}}  {shown(name, value)}" for name, value in evaluation.figures.items()]
    return [f"{evaluation.task}{of}, on {evaluation.data}", *rows]
