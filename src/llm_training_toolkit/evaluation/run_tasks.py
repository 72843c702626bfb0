"""The tasks of `eval.tasks`, carried out on an exported model: when a run finishes, and on its way (`midway.py`).

Rank 0 does it alone: generation under ZeRO 3 would need all ranks at every token. A task that fails says so and leaves
the run as it is.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.config import Config, EvalTask
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import PlanError, ToolkitError
from llm_training_toolkit.evaluation.humaneval import measure_humaneval
from llm_training_toolkit.evaluation.infill import measure_infill
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.perplexity import measure_perplexity
from llm_training_toolkit.evaluation.records import Evaluation, keep
from llm_training_toolkit.evaluation.table import in_a_line
from llm_training_toolkit.evaluation.task import HumanEval, Measured, Perplexity, Progress, Task, make_task
from llm_training_toolkit.export import exported_from
from llm_training_toolkit.export.export_run import Trained
from llm_training_toolkit.models.memory import is_out_of_memory
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory, write_atomically
from llm_training_toolkit.runs.storage import storage_of

_BEGUN = "\nbegun"
_TRIES = 2
"""One more than needed where a node is lost meanwhile, and one less than `failures.max` allows."""
DEADLY = (
    f"were not carried out: {_TRIES} times the process that began them was gone before they were done (did memory run "
    "out?). The run itself is whole; ltt evaluate measures it elsewhere"
)


@dataclass(frozen=True)
class Mark:
    """Whether tasks of one checkpoint were carried out, with whatever success, as a file says.

    Tasks that end their own process, by taking the memory of the machine, must not end every one that follows: what was
    begun so often and never came to an end is not begun again.
    """

    path: Path
    what: str
    """As `described`."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to do."""
        return self._says() == self.what

    def begin(self) -> bool:
        """Write down that they begin; False where that is not to be tried any more. Raises OSError."""
        before = self._says()
        tries = before.count(_BEGUN) if before.startswith(self.what + _BEGUN) else 0
        if tries >= _TRIES:
            return False
        write_atomically(self.path, self.what + (tries + 1) * _BEGUN)
        return True

    def settle(self) -> None:
        """Write down that they are done. Raises OSError."""
        write_atomically(self.path, self.what)

    def forget(self) -> None:
        """They were not wanted any more: the next start begins as if nothing had been."""
        self.path.unlink(missing_ok=True)

    def _says(self) -> str:
        return self.path.read_text() if self.path.is_file() else ""


def carry_out(trained: Trained, *, metrics: Metrics, context: RunContext) -> None:
    """Measure the export by each task; the figures go into the run, to its metrics and onto the screen."""
    tasks = trained.config.eval.tasks
    if not tasks:
        return
    mark = _mark(trained.run, trained.config)
    if mark.begin():
        measure_each(tasks, trained.run.export, trained, metrics=metrics, context=context, word=_nobody_waits)
    else:
        context.report({"kind": "warning", "message": f"eval.tasks {DEADLY}"})
    mark.settle()


def _nobody_waits() -> None:
    """The other ranks are done."""


def measure_each(
    tasks: Sequence[EvalTask],
    model: Path,
    trained: Trained,
    *,
    metrics: Metrics,
    context: RunContext,
    word: Callable[[], None],
) -> None:
    """Measure an exported model of the run by each task. `word` is called as they get on; what it raises goes through.

    Whatever else a task raises is reported.
    """
    for asked in tasks:
        context.report({"kind": "note", "message": f"evaluating {asked.task}"})
        word()
        measuring = _Measuring(asked.task, context, word)
        try:
            evaluation = _evaluate(asked, model, trained, context, measuring)
        except Exception as error:  # the weights are saved: nothing here may end the run
            if error is measuring.broken_off:
                raise
            _report_failure(asked, reason(error), trained, context)
        else:
            metrics.write(evaluation.step or 0, evaluation.metrics())
            context.report({"kind": "note", "message": in_a_line(evaluation)})


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
        return not config.eval.tasks or _mark(run, config).is_settled
    except OSError:
        return False


def _mark(run: RunDirectory, config: Config) -> Mark:
    return Mark(run.evaluations / "at_end", described(exported_from(run.export), config.eval.tasks))


def described(checkpoint: str | None, tasks: Sequence[EvalTask]) -> str:
    """What tasks measured of which checkpoint, whenever it was."""
    return json.dumps([checkpoint, [task.model_dump(mode="json", exclude={"every"}) for task in tasks]])


def _evaluate(asked: EvalTask, model: Path, trained: Trained, context: RunContext, progress: Progress) -> Evaluation:
    task = make_task(asked.task, asked.settings())
    subject = Subject(model, device=str(context.device))
    assert subject.origin is not None
    measured = measure(task, subject, progress)
    for note in measured.notes:
        context.report({"kind": "note", "message": f"{asked.task}: {note}"})
    evaluation = Evaluation.of(task.name, measured, subject.directory, trained.run.name, subject.origin.step)
    keep(trained.run, evaluation, measured.items)
    return evaluation


class _Measuring:
    """Tells how far a task is, once a second (from a worker every word travels), and that it goes on."""

    def __init__(self, task: str, context: RunContext, word: Callable[[], None]) -> None:
        self._task, self._context, self._word = task, context, word
        self._last = -math.inf
        self.broken_off: Exception | None = None
        """What `word` raised: the task did not fail, it is not wanted any more."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """The `Progress` of an evaluation."""
        try:
            self._word()
        except Exception as error:
            self.broken_off = error
            raise
        if done == total or time.monotonic() >= self._last + 1.0:
            self._last = time.monotonic()
            self._context.report({"kind": "stage", "name": f"{self._task}: {stage}", "done": done, "total": total})


def _report_failure(asked: EvalTask, why: str, trained: Trained, context: RunContext) -> None:
    again = f"ltt evaluate {storage_of(trained.run.path).address(trained.run.path)} --task {asked.task}"
    message = f"eval.tasks: {asked.task} was not evaluated: {why}. The run itself is whole; later: {again}"
    context.report({"kind": "warning", "message": message})


def measure(task: Task, subject: Subject | None, progress: Progress) -> Measured:
    """What a task gives. Raises PlanError where it needs a model and there is none."""
    if isinstance(task, HumanEval):
        return measure_humaneval(task, subject, progress)
    if subject is None:
        raise PlanError(f"--task {task.name}: name a model, an exported directory or a run")
    if isinstance(task, Perplexity):
        return measure_perplexity(task, subject, progress)
    return measure_infill(task, subject, progress)
