"""Runs tasks of `eval.tasks` with an `interval` during training, on an export of that step's checkpoint.

Rank 0 runs the tasks. The others block in a broadcast that rank 0 repeats at most once a second, so no collective times
out. A stop request aborts the tasks; the next attempt reruns them.
"""

from __future__ import annotations

import gc
import math
import time
from typing import NamedTuple

import torch

from llm_training_toolkit.checkpoint import CheckpointReader, find_latest_checkpoint
from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.config import EvalTaskConfig
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT
from llm_training_toolkit.evaluation.run_tasks import (
    TASKS_SKIPPED_MESSAGE,
    DoneMarker,
    build_task_key,
    format_failure_reason,
    run_tasks,
)
from llm_training_toolkit.export import remove_export
from llm_training_toolkit.export.export_run import export_checkpoint
from llm_training_toolkit.monitoring.metrics import Metrics

_KEEPALIVE_SECONDS = 1.0  # minimum between two broadcasts of rank 0


class _TaskKeepalive(NamedTuple):
    """Message of rank 0 to the waiting ranks."""

    done: bool
    stop_request: StopRequest = StopRequest.NONE


class _StopRequestedError(Exception):
    """Aborts the tasks because the run should stop."""

    def __init__(self, stop_request: StopRequest) -> None:
        super().__init__()
        self.stop_request = stop_request


class InTrainingEvaluator:
    """Runs the tasks that are due between two steps."""

    def __init__(self, trained: Run, *, metrics: Metrics, context: RunContext) -> None:
        self._trained, self._metrics, self._context = trained, metrics, context
        self._last_keepalive = -math.inf
        self._broadcast_error: Exception | None = None  # other ranks are gone, so no task failed
        if context.is_rank_zero:
            self._remove_export()  # left by a killed attempt

    def has_due_tasks(self, step: int) -> bool:
        """Return whether tasks are due after `step` steps; they need a checkpoint of that step."""
        return bool(self._find_due_tasks(step))

    def run_due_tasks(self, step: int) -> StopRequest:
        """Run the due tasks on the checkpoint of `step`, unless already done. Return any stop request received.

        Collective. Failures are only reported.
        """
        self._context.heartbeat.set_phase(f"carrying out the tasks of step {step}", NO_TIMEOUT)
        if not self._context.is_rank_zero:
            while not (word := self._context.broadcast_object(_TaskKeepalive(done=False))).done:
                pass
            return word.stop_request
        try:
            self._evaluate_step(step)
            stop_request = StopRequest.NONE
        except _StopRequestedError as error:
            stop_request = error.stop_request
        return self._context.broadcast_object(_TaskKeepalive(done=True, stop_request=stop_request)).stop_request

    def _find_due_tasks(self, step: int) -> list[EvalTaskConfig]:
        return [task for task in self._trained.config.eval.tasks if task.interval and step % task.interval == 0]

    def _evaluate_step(self, step: int) -> None:
        try:
            self._evaluate_latest_checkpoint(step)
        except _StopRequestedError:
            raise
        except Exception as error:  # the other ranks wait for a broadcast, and the run itself is intact
            if error is self._broadcast_error:
                raise
            message = (
                f"the tasks of step {step} were not carried out: {format_failure_reason(error)}. The run continues"
            )
            self._context.report(WarningEvent(message))
        finally:
            self._remove_export()
            self._free_memory()

    def _evaluate_latest_checkpoint(self, step: int) -> None:
        """Evaluate the newest checkpoint, which is that of `step`: the loop saves before it calls."""
        run, tasks = self._trained.directory, self._find_due_tasks(step)
        directory = find_latest_checkpoint(run.checkpoints_dir)
        assert directory is not None
        mark = DoneMarker(run.evaluations_dir / f"at_step_{step}", build_task_key(directory.name, tasks))
        if mark.is_done:
            return
        if not mark.record_attempt():
            self._context.report(WarningEvent(f"the tasks of step {step} {TASKS_SKIPPED_MESSAGE}"))
            mark.mark_done()
            return
        try:
            self._send_keepalive()
            export_checkpoint(
                self._trained,
                CheckpointReader(directory, run.storage),
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
        """Broadcast that the tasks are still running. Raises _StopRequestedError on a stop request."""
        if time.monotonic() < self._last_keepalive + _KEEPALIVE_SECONDS:
            return
        self._last_keepalive = time.monotonic()
        try:
            self._context.broadcast_object(_TaskKeepalive(done=False))
        except Exception as error:
            self._broadcast_error = error
            raise
        stop_request = self._context.read_stop_request()
        if (
            stop_request is not StopRequest.NONE
        ):  # including requests that wait for a checkpoint: this step's is written
            raise _StopRequestedError(stop_request)

    def _remove_export(self) -> None:
        remove_export(self._trained.directory.task_export_dir)

    def _free_memory(self) -> None:
        """Free the memory of the evaluated model for the engine."""
        gc.collect()  # a process's first model is in a reference cycle and would stay allocated
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
