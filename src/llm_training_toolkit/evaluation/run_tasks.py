"""Runs the tasks of `eval.tasks` on an exported model: at the end of a run, and during training (`in_training.py`).

Rank 0 runs them alone, because generation under ZeRO 3 would need all ranks for every token. A failed task is reported
and leaves the run intact.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.config import Config, EvalTaskConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import NoteEvent, StageEvent, WarningEvent
from llm_training_toolkit.errors import PlanError, ToolkitError
from llm_training_toolkit.evaluation.code_tasks.humaneval import measure_humaneval
from llm_training_toolkit.evaluation.code_tasks.mbpp import measure_mbpp
from llm_training_toolkit.evaluation.infill import measure_infill
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.perplexity import measure_perplexity
from llm_training_toolkit.evaluation.records import EvalRecord, write_eval_record
from llm_training_toolkit.evaluation.table import format_summary_line
from llm_training_toolkit.evaluation.task import (
    EvalResult,
    HumanEvalTask,
    MbppTask,
    PerplexityTask,
    ProgressCallback,
    Task,
    ToolCallsTask,
    make_task,
)
from llm_training_toolkit.evaluation.tool_calls import measure_tool_calls
from llm_training_toolkit.export import read_source_checkpoint_name
from llm_training_toolkit.models.memory import is_out_of_memory
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory

_ATTEMPT_LINE = "\nbegun"
_MAX_ATTEMPTS = 2  # one more than a single lost node requires, one less than `failures.max_failures` allows.
TASKS_SKIPPED_MESSAGE = (
    f"were not carried out: {_MAX_ATTEMPTS} times the process that began them was gone before they were done "
    "(did memory run "
    "out?). The run itself is whole; ltt evaluate measures it elsewhere"
)


@dataclass(frozen=True)
class DoneMarker:
    """File that records whether the tasks of a checkpoint have finished, successfully or not.

    Tasks that kill their own process, such as by exhausting the machine's memory, must not kill every later attempt.
    After `_MAX_ATTEMPTS` unfinished attempts they are skipped.
    """

    path: Path
    task_key: str
    """Key from `build_task_key`."""

    @property
    def is_done(self) -> bool:
        """Return whether the tasks have finished."""
        return self._read_content() == self.task_key

    def record_attempt(self) -> bool:
        """Record the start of an attempt. Return False if the attempts are used up. Raises OSError."""
        before = self._read_content()
        tries = before.count(_ATTEMPT_LINE) if before.startswith(self.task_key + _ATTEMPT_LINE) else 0
        if tries >= _MAX_ATTEMPTS:
            return False
        write_atomically(self.path, self.task_key + (tries + 1) * _ATTEMPT_LINE)
        return True

    def mark_done(self) -> None:
        """Record that the tasks have finished. Raises OSError."""
        write_atomically(self.path, self.task_key)

    def clear_attempts(self) -> None:
        """Forget the attempts, so that an aborted one does not count."""
        self.path.unlink(missing_ok=True)

    def _read_content(self) -> str:
        return self.path.read_text() if self.path.is_file() else ""


def run_final_tasks(trained: Run, *, metrics: Metrics, context: RunContext) -> None:
    """Run the tasks on the final export. Results go to the run's records, its metrics and the console."""
    tasks = trained.config.eval.tasks
    if not tasks:
        return
    mark = _build_done_marker(trained.directory, trained.config)
    if mark.record_attempt():
        run_tasks(tasks, trained.directory.export_dir, trained, metrics=metrics, context=context)
    else:
        context.report(WarningEvent(f"eval.tasks {TASKS_SKIPPED_MESSAGE}"))
    mark.mark_done()


def run_tasks(
    tasks: Sequence[EvalTaskConfig],
    model: Path,
    trained: Run,
    *,
    metrics: Metrics,
    context: RunContext,
    word: Callable[[], None] | None = None,
) -> None:
    """Run each task on an exported model of the run. Exceptions of a task are reported.

    `word` is the keepalive for ranks that wait, called on progress; its exceptions propagate.
    """
    for asked in tasks:
        context.report(NoteEvent(f"evaluating {asked.task}"))
        if word is not None:
            word()
        measuring = _TaskProgress(asked.task, context, word)
        try:
            evaluation = _run_and_record(asked, model, trained, context, measuring)
        except Exception as error:  # the weights are saved: a failed task must not fail the run
            if error is measuring.keepalive_error:
                raise
            _report_failure(asked, format_failure_reason(error), trained, context)
        else:
            metrics.write(evaluation.step or 0, evaluation.to_metrics())
            context.report(NoteEvent(format_summary_line(evaluation)))


def format_failure_reason(error: Exception) -> str:
    """Return the reason of a failure for the report. The traceback of an unexpected exception goes to the log."""
    if isinstance(error, ToolkitError):
        return str(error)
    if is_out_of_memory(error):
        return "memory ran out"
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def has_finished_tasks(run: RunDirectory, config: Config) -> bool:
    """Return whether the current tasks have finished for the current export, successfully or not."""
    try:
        return not config.eval.tasks or _build_done_marker(run, config).is_done
    except OSError:
        return False


def _build_done_marker(run: RunDirectory, config: Config) -> DoneMarker:
    return DoneMarker(
        run.evaluations_dir / "at_end", build_task_key(read_source_checkpoint_name(run.export_dir), config.eval.tasks)
    )


def build_task_key(checkpoint: str | None, tasks: Sequence[EvalTaskConfig]) -> str:
    """Return a key of the checkpoint and its tasks, regardless of their `interval`."""
    plain = [task.model_copy(update={"data": redact_uri(task.data)}) if task.data else task for task in tasks]
    return json.dumps([checkpoint, [task.model_dump(mode="json", exclude={"interval"}) for task in plain]])


def _run_and_record(
    asked: EvalTaskConfig, model: Path, trained: Run, context: RunContext, progress: ProgressCallback
) -> EvalRecord:
    task = make_task(asked.task, asked.get_task_options())
    subject = EvalModel(model, device=str(context.device))
    assert subject.origin is not None
    subject.origin = replace(subject.origin, config=trained.config)  # the file has no signatures of addresses
    measured = run_task(task, subject, progress)
    for note in measured.notes:
        context.report(NoteEvent(f"{asked.task}: {note}"))
    evaluation = EvalRecord.from_result(
        task.name, measured, subject.directory, trained.directory.name, subject.origin.step
    )
    write_eval_record(trained.directory, evaluation, measured.items)
    return evaluation


class _TaskProgress:
    """Progress callback of a task: sends the keepalive, and reports once a second, since events cross the network."""

    def __init__(self, task: str, context: RunContext, word: Callable[[], None] | None) -> None:
        self._task, self._context, self._send_keepalive = task, context, word
        self._last = -math.inf
        self.keepalive_error: Exception | None = None
        """Exception raised by `word`: the task was aborted and did not fail."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Implement `ProgressCallback`."""
        try:
            if self._send_keepalive is not None:
                self._send_keepalive()
        except Exception as error:
            self.keepalive_error = error
            raise
        if done == total or time.monotonic() >= self._last + 1.0:
            self._last = time.monotonic()
            self._context.report(StageEvent(f"{self._task}: {stage}", done, total))


def _report_failure(asked: EvalTaskConfig, why: str, trained: Run, context: RunContext) -> None:
    again = f"ltt evaluate {trained.directory.uri} --task {asked.task}"
    message = f"eval.tasks: {asked.task} was not evaluated: {why}. The run itself is whole; later: {again}"
    context.report(WarningEvent(message))


def run_task(task: Task, subject: EvalModel | None, progress: ProgressCallback) -> EvalResult:
    """Run a task and return its result. Raises PlanError for a task that needs a model without one."""
    if isinstance(task, HumanEvalTask):
        return measure_humaneval(task, subject, progress)
    if isinstance(task, MbppTask):
        return measure_mbpp(task, subject, progress)
    if subject is None:
        raise PlanError(f"--task {task.name}: name a model, an exported directory or a run")
    if isinstance(task, PerplexityTask):
        return measure_perplexity(task, subject, progress)
    if isinstance(task, ToolCallsTask):
        return measure_tool_calls(task, subject, progress)
    return measure_infill(task, subject, progress)
