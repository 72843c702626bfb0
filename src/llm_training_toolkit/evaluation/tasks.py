"""Carries a task out."""

from __future__ import annotations

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.evaluation.humaneval import measure_humaneval
from llm_training_toolkit.evaluation.infill import measure_infill
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.perplexity import measure_perplexity
from llm_training_toolkit.evaluation.result import Measured, Progress
from llm_training_toolkit.evaluation.settings import HumanEval, Perplexity, Task


def measure(task: Task, subject: Subject | None, progress: Progress) -> Measured:
    """What a task gives. Raises PlanError where it needs a model and there is none."""
    if isinstance(task, HumanEval):
        return measure_humaneval(task, subject, progress)
    if subject is None:
        raise PlanError(f"--task {task.name}: name a model, an exported directory or a run")
    if isinstance(task, Perplexity):
        return measure_perplexity(task, subject, progress)
    return measure_infill(task, subject, progress)
