"""Tasks of `eval.tasks` that have an `every`: carried out while the run trains, on an export of that step's checkpoint.

Rank 0 works and the others wait for its word, which comes at every advance, at most once a second, so that no exchange
between them runs out of time. A wish to end the run breaks off; the next start makes up for what was not done.
"""

from __future__ import annotations

import gc
import math
import time
from typing import NamedTuple

import torch

from llm_training_toolkit.checkpoint import CheckpointReader, find_latest_checkpoint
from llm_training_toolkit.config import EvalTaskConfig
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT
from llm_training_toolkit.evaluation.run_tasks import (
    TASKS_SKIPPED_MESSAGE,
    DoneMarker,
    build_task_key,
    format_failure_reason,
    run_tasks,
)
from llm_training_toolkit.export import remove_export
from llm_training_toolkit.export.export_run import TrainedRun, export_checkpoint
from llm_training_toolkit.monitoring.metrics import Metrics

_KEEPALIVE_SECONDS = 1.0
"""Seconds between two words of rank 0."""


class _TaskKeepalive(NamedTuple):
    """What rank 0 tells those that wait."""

    done: bool
    stop_request: StopRequest = StopRequest.NONE


class _StopRequestedError(Exception):
    """The run is to end: the tasks are not waited for."""

    def __init__(self, wish: StopRequest) -> None:
        super().__init__()
        self.stop_request = wish


class InTrainingEvaluator:
    """Carries out what is due between two steps."""

    def __init__(self, trained: TrainedRun, *, metrics: Metrics, context: RunContext) -> None:
        self._trained, self._metrics, self._context = trained, metrics, context
        self._last_keepalive = -math.inf
        self._broadcast_error: Exception | None = None
        """What was raised as a word was given: other ranks are gone, which is no failure of a task."""
        if context.is_rank_zero:
            self._remove_export()  # of an attempt that was killed

    def has_due_tasks(self, step: int) -> bool:
        """Whether tasks are to be carried out after `step` steps, which needs a checkpoint of that step."""
        return bool(self._find_due_tasks(step))

    def run_due_tasks(self, step: int) -> StopRequest:
        """Measure the checkpoint of `step`, unless that was done before; what is wished of the run meanwhile.

        Collective. Whatever fails is reported and no more.
        """
        self._context.heartbeat.set_phase(f"carrying out the tasks of step {step}", NO_TIMEOUT)
        if not self._context.is_rank_zero:
            while not (word := self._context.broadcast_object(_TaskKeepalive(done=False))).done:
                pass
            return word.stop_request
        try:
            self._evaluate_step(step)
            wish = StopRequest.NONE
        except _StopRequestedError as error:
            wish = error.stop_request
        return self._context.broadcast_object(_TaskKeepalive(done=True, stop_request=wish)).stop_request

    def _find_due_tasks(self, step: int) -> list[EvalTaskConfig]:
        return [task for task in self._trained.config.eval.tasks if task.interval and step % task.interval == 0]

    def _evaluate_step(self, step: int) -> None:
        try:
            self._evaluate_latest_checkpoint(step)
        except _StopRequestedError:
            raise
        except Exception as error:  # the others wait for a word, and the run is as whole as before
            if error is self._broadcast_error:
                raise
            message = f"the tasks of step {step} were not carried out: {format_failure_reason(error)}. The run goes on"
            self._context.report({"kind": "warning", "message": message})
        finally:
            self._remove_export()
            self._free_memory()

    def _evaluate_latest_checkpoint(self, step: int) -> None:
        """Measure the newest checkpoint, which is that of `step`: the loop saves before it asks."""
        run, tasks = self._trained.run, self._find_due_tasks(step)
        directory = find_latest_checkpoint(run.checkpoints_dir)
        assert directory is not None
        mark = DoneMarker(run.evaluations_dir / f"at_step_{step}", build_task_key(directory.name, tasks))
        if mark.is_done:
            return
        if not mark.record_attempt():
            self._context.report({"kind": "warning", "message": f"the tasks of step {step} {TASKS_SKIPPED_MESSAGE}"})
            mark.mark_done()
            return
        try:
            self._send_keepalive()
            export_checkpoint(
                self._trained,
                CheckpointReader(directory),
                run.task_export_dir,
                merge=False,
                say=lambda _text: self._send_keepalive(),
            )
            run_tasks(
                tasks,
                run.task_export_dir,
                self._trained,
                metrics=self._metrics,
                context=self._context,
                word=self._send_keepalive,
            )
        except Exception as error:
            if error is not self._broadcast_error:
                mark.clear_attempts()
            raise
        mark.mark_done()

    def _send_keepalive(self) -> None:
        """Tell the others that it goes on. Raises _BrokenOffError where the run is to end."""
        if time.monotonic() < self._last_keepalive + _KEEPALIVE_SECONDS:
            return
        self._last_keepalive = time.monotonic()
        try:
            self._context.broadcast_object(_TaskKeepalive(done=False))
        except Exception as error:
            self._broadcast_error = error
            raise
        wish = self._context.read_stop_request()
        if wish is not StopRequest.NONE:  # also one that waits for a checkpoint: that of this step is written
            raise _StopRequestedError(wish)

    def _remove_export(self) -> None:
        remove_export(self._trained.run.task_export_dir)

    def _free_memory(self) -> None:
        """Give back the room of the model that was measured, which the engine needs."""
        gc.collect()  # the first model that a process loads stands in a circle of references: it was there still
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
