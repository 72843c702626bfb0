"""The tasks of `eval.tasks`, carried out on the exported model when a run finishes.

Rank 0 does it alone: generation under ZeRO 3 would need all ranks at every token. A task that fails says so and leaves
the run as it is, finished and exported.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from pathlib import Path

from llm_training_toolkit.config import Config, EvalTask
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import ToolkitError
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.records import Evaluation, keep
from llm_training_toolkit.evaluation.result import Progress
from llm_training_toolkit.evaluation.settings import make_task
from llm_training_toolkit.evaluation.table import in_a_line
from llm_training_toolkit.evaluation.tasks import measure
from llm_training_toolkit.export import exported_from
from llm_training_toolkit.launch.exporting import Trained
from llm_training_toolkit.launch.sizing import is_out_of_memory
from llm_training_toolkit.metrics import Metrics
from llm_training_toolkit.runs import RunDirectory, write_atomically


def carry_out(trained: Trained, *, metrics: Metrics, context: RunContext) -> None:
    """Measure the export by each task; the figures go into the run, to its metrics and onto the screen."""
    if not trained.config.eval.tasks:
        return
    for asked in trained.config.eval.tasks:
        context.report({"kind": "note", "message": f"evaluating {asked.task}"})
        try:
            evaluation = _evaluate(asked, trained, context)
        except Exception as error:  # noqa: BLE001 - the run is trained and exported: nothing here may end it
            _report_failure(asked, reason(error), trained, context)
        else:
            metrics.write(evaluation.step or 0, evaluation.metrics())
            context.report({"kind": "note", "message": in_a_line(evaluation)})
    write_atomically(_mark(trained.run), _what(trained.run, trained.config))


def reason(error: Exception) -> str:
    """Why something at the end of a run was not done; what nobody foresaw goes into the log in full."""
    if isinstance(error, ToolkitError):
        return str(error)
    if is_out_of_memory(error):
        return "memory ran out"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def are_carried_out(run: RunDirectory, config: Config) -> bool:
    """Whether this was done for the present export and the present tasks, with whatever success."""
    try:
        return not config.eval.tasks or _mark(run).read_text() == _what(run, config)
    except OSError:
        return False


def _mark(run: RunDirectory) -> Path:
    return run.evaluations / "at_end"


def _what(run: RunDirectory, config: Config) -> str:
    return json.dumps([exported_from(run.export), config.eval.model_dump(mode="json")["tasks"]])


def _evaluate(asked: EvalTask, trained: Trained, context: RunContext) -> Evaluation:
    task = make_task(asked.task, asked.settings())
    subject = Subject(trained.run.path, device=str(context.device))
    assert subject.origin is not None
    measured = measure(task, subject, _told(asked.task, context))
    for note in measured.notes:
        context.report({"kind": "note", "message": f"{asked.task}: {note}"})
    evaluation = Evaluation.of(task.name, measured, subject.directory, trained.run.name, subject.origin.step)
    keep(trained.run, evaluation, measured.items)
    return evaluation


def _told(task: str, context: RunContext) -> Progress:
    """Tells how far a task is, once a second: from a worker every word travels."""
    last = -math.inf

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() >= last + 1.0:
            last = time.monotonic()
            context.report({"kind": "stage", "name": f"{task}: {stage}", "done": done, "total": total})

    return tell


def _report_failure(asked: EvalTask, why: str, trained: Trained, context: RunContext) -> None:
    again = f"ltt evaluate {trained.run.path} --task {asked.task}"
    message = f"eval.tasks: {asked.task} was not evaluated: {why}. The run is whole; later: {again}"
    context.report({"kind": "warning", "message": message})
