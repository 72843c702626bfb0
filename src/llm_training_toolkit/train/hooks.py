"""What may happen between two steps beside a checkpoint: an evaluation, tasks, a rung of a search, a wait for data.

Each says how the loop ends there, or None where it goes on. All of them are collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from llm_training_toolkit.checkpoint.state import Progress
from llm_training_toolkit.data.dataset import MicroBatch
from llm_training_toolkit.distributed.context import Wish
from llm_training_toolkit.distributed.heartbeat import UNLIMITED, Pulse
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.validation import HeldOut, held_out
from llm_training_toolkit.train.components import Parts, Status

_LOOK_SECONDS = 0.5
"""Between looks for data that is being prepared."""


def wait_where_data_lacks(parts: Parts, progress: Progress) -> Status | None:
    """Wait where some rank lacks data of the next step; how the loop ends where a wish came first. Collective."""
    lacks = progress.step < parts.schedule.steps and not parts.feed.has(progress.step)
    [lacking] = parts.context.sum(lacks)
    return wait_for_data(parts, progress) if lacking else None


def wait_for_data(parts: Parts, progress: Progress) -> Status | None:
    """Wait until every rank has the data of the next step; how the loop ends where a wish came first, saved now.

    Collective. Raises DataError on every rank when it will never be there.
    """
    context, feed = parts.context, parts.feed
    parts.saver.complete()  # the wait may be long, and end with the processes
    context.pulse.mark("waiting for data that is being prepared", UNLIMITED)
    parts.account.enter("data")
    if context.is_first:
        message = f"step {progress.step + 1} waits for data of the next epoch, which is being prepared"
        context.report({"kind": "note", "message": message})
    while True:
        failure = ""
        try:
            if not feed.has(progress.step):
                feed.look()
        except DataError as error:
            failure = str(error)
        wish = context.wish() if context.is_first else Wish.GO_ON
        answers = context.gather((feed.has(progress.step), failure, wish))
        if failures := [failure for _, failure, _ in answers if failure]:
            raise DataError(failures[0])
        if (wish := answers[0][2]) is not Wish.GO_ON:
            if progress != parts.origin:  # that one is saved, or the run's beginning
                parts.saver.begin(progress)
            return "stopped" if wish is Wish.STOP else "left"
        if all(has for has, _, _ in answers):
            return None
        time.sleep(_LOOK_SECONDS)


def at_tasks(parts: Parts, progress: Progress) -> Status | None:
    """Carry out what is due, on the checkpoint of this step; how the loop ends where that was wished. Collective.

    Nothing is after the last step, whose export is measured by all tasks when the run finishes.
    """
    if not 0 < progress.step < parts.schedule.steps or not parts.midway.due(progress.step):
        return None
    parts.saver.complete()
    parts.account.enter_step(progress.step)
    wish = parts.midway.carry_out(progress.step)
    if wish is Wish.GO_ON:
        return None
    return "stopped" if wish is Wish.STOP else "left"


def at_rung(parts: Parts, progress: Progress) -> Status | None:
    """Wait for the answer whether this trial of a search goes on; one that does not needs no checkpoint. Collective."""
    context = parts.context
    if progress.step not in context.rungs:
        return None
    context.pulse.mark(f"waiting at the rung after step {progress.step}", UNLIMITED)
    wish = context.broadcast(context.ask(progress.step) if context.is_first else Wish.GO_ON)
    return "stopped" if wish is Wish.STOP else None


def evaluate(parts: Parts, progress: Progress) -> HeldOut | None:
    """Measure the held-out loss now; None where nothing is held out. Collective."""
    context, feed = parts.context, parts.feed
    if feed.eval_tokens == 0:
        return None
    batches = _marked(feed.eval_batches(context.rank, context.world_size, parts.plan.micro_batch), context.pulse)
    result = held_out(parts.engine, batches, feed.eval_tokens, feed.eval_bytes, context)
    parts.metrics.write(progress.step, result.values())
    parts.saver.measured(progress.step, result.loss)
    if context.is_first:
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        context.report({"kind": "eval", "step": progress.step, **values})
    return result


def _marked(batches: Sequence[MicroBatch], pulse: Pulse) -> Iterator[MicroBatch]:
    """The batches of an evaluation, each of which is an advance."""
    for number, batch in enumerate(batches, start=1):
        pulse.mark(f"evaluating, batch {number} of {len(batches)}")
        yield batch
    pulse.mark("evaluating, adding up the losses")
