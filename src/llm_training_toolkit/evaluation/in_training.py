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

from llm_training_toolkit.checkpoint import Checkpoint, newest
from llm_training_toolkit.config import EvalTask
from llm_training_toolkit.distributed.context import RunContext, Wish
from llm_training_toolkit.distributed.heartbeat import UNLIMITED
from llm_training_toolkit.evaluation.run_tasks import DEADLY, Mark, described, measure_each, reason
from llm_training_toolkit.export import remove_export
from llm_training_toolkit.export.export_run import Trained, export_checkpoint
from llm_training_toolkit.monitoring.metrics import Metrics

_WORD_EVERY = 1.0
"""Seconds between two words of rank 0."""


class _Word(NamedTuple):
    """What rank 0 tells those that wait."""

    done: bool
    wish: Wish = Wish.GO_ON


class _BrokenOffError(Exception):
    """The run is to end: the tasks are not waited for."""

    def __init__(self, wish: Wish) -> None:
        super().__init__()
        self.wish = wish


class Midway:
    """Carries out what is due between two steps."""

    def __init__(self, trained: Trained, *, metrics: Metrics, context: RunContext) -> None:
        self._trained, self._metrics, self._context = trained, metrics, context
        self._last = -math.inf
        self._unheard: Exception | None = None
        """What was raised as a word was given: other ranks are gone, which is no failure of a task."""
        if context.is_first:
            self._remove_export()  # of an attempt that was killed

    def due(self, step: int) -> bool:
        """Whether tasks are to be carried out after `step` steps, which needs a checkpoint of that step."""
        return bool(self._tasks(step))

    def carry_out(self, step: int) -> Wish:
        """Measure the checkpoint of `step`, unless that was done before; what is wished of the run meanwhile.

        Collective. Whatever fails is reported and no more.
        """
        self._context.pulse.mark(f"carrying out the tasks of step {step}", UNLIMITED)
        if not self._context.is_first:
            while not (word := self._context.broadcast(_Word(done=False))).done:
                pass
            return word.wish
        try:
            self._measure(step)
            wish = Wish.GO_ON
        except _BrokenOffError as error:
            wish = error.wish
        return self._context.broadcast(_Word(done=True, wish=wish)).wish

    def _tasks(self, step: int) -> list[EvalTask]:
        return [task for task in self._trained.config.eval.tasks if task.every and step % task.every == 0]

    def _measure(self, step: int) -> None:
        try:
            self._measure_newest(step)
        except _BrokenOffError:
            raise
        except Exception as error:  # the others wait for a word, and the run is as whole as before
            if error is self._unheard:
                raise
            message = f"the tasks of step {step} were not carried out: {reason(error)}. The run goes on"
            self._context.report({"kind": "warning", "message": message})
        finally:
            self._remove_export()
            self._free()

    def _measure_newest(self, step: int) -> None:
        """Measure the newest checkpoint, which is that of `step`: the loop saves before it asks."""
        run, tasks = self._trained.run, self._tasks(step)
        directory = newest(run.checkpoints)
        assert directory is not None
        mark = Mark(run.evaluations / f"at_step_{step}", described(directory.name, tasks))
        if mark.is_settled:
            return
        if not mark.begin():
            self._context.report({"kind": "warning", "message": f"the tasks of step {step} {DEADLY}"})
            mark.settle()
            return
        try:
            self._give_word()
            export_checkpoint(
                self._trained, Checkpoint(directory), run.task_export, merge=False, say=lambda _text: self._give_word()
            )
            measure_each(
                tasks,
                run.task_export,
                self._trained,
                metrics=self._metrics,
                context=self._context,
                word=self._give_word,
            )
        except Exception as error:
            if error is not self._unheard:
                mark.forget()
            raise
        mark.settle()

    def _give_word(self) -> None:
        """Tell the others that it goes on. Raises _BrokenOffError where the run is to end."""
        if time.monotonic() < self._last + _WORD_EVERY:
            return
        self._last = time.monotonic()
        try:
            self._context.broadcast(_Word(done=False))
        except Exception as error:
            self._unheard = error
            raise
        wish = self._context.wish()
        if wish is not Wish.GO_ON:  # also one that waits for a checkpoint: that of this step is written
            raise _BrokenOffError(wish)

    def _remove_export(self) -> None:
        remove_export(self._trained.run.task_export)

    def _free(self) -> None:
        """Give back the room of the model that was measured, which the engine needs."""
        gc.collect()  # the first model that a process loads stands in a circle of references: it was there still
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()
