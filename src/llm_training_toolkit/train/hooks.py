"""What may happen between two steps beside a checkpoint: an evaluation, tasks, a rung of a search, a wait for data.

Each says how the loop ends there, or None where it goes on. All of them are collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.data.dataset import MicroBatch
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT, Heartbeat
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.validation import EvalLoss, compute_eval_loss
from llm_training_toolkit.train.components import LoopStatus, TrainerComponents

_POLL_SECONDS = 0.5
"""Between looks for data that is being prepared."""


def wait_if_data_missing(parts: TrainerComponents, progress: TrainState) -> LoopStatus | None:
    """Wait where some rank lacks data of the next step; how the loop ends where a wish came first. Collective."""
    lacks = progress.step < parts.schedule.steps and not parts.dataloader.has_step(progress.step)
    [lacking] = parts.context.all_reduce_sum(lacks)
    return wait_for_data(parts, progress) if lacking else None


def wait_for_data(parts: TrainerComponents, progress: TrainState) -> LoopStatus | None:
    """Wait until every rank has the data of the next step; how the loop ends where a wish came first, saved now.

    Collective. Raises DataError on every rank when it will never be there.
    """
    context, feed = parts.context, parts.dataloader
    parts.checkpoint_manager.finalize_save()  # the wait may be long, and end with the processes
    context.heartbeat.set_phase("waiting for data that is being prepared", NO_TIMEOUT)
    parts.goodput_tracker.enter_part("data")
    if context.is_rank_zero:
        message = f"step {progress.step + 1} waits for data of the next epoch, which is being prepared"
        context.report({"kind": "note", "message": message})
    while True:
        failure = ""
        try:
            if not feed.has_step(progress.step):
                feed.refresh_epochs()
        except DataError as error:
            failure = str(error)
        wish = context.read_stop_request() if context.is_rank_zero else StopRequest.NONE
        answers = context.all_gather_object((feed.has_step(progress.step), failure, wish))
        if failures := [failure for _, failure, _ in answers if failure]:
            raise DataError(failures[0])
        if (wish := answers[0][2]) is not StopRequest.NONE:
            if progress != parts.initial_state:  # that one is saved, or the run's beginning
                parts.checkpoint_manager.begin_save(progress)
            return "stopped" if wish is StopRequest.STOP else "left"
        if all(has for has, _, _ in answers):
            return None
        time.sleep(_POLL_SECONDS)


def run_tasks_if_due(parts: TrainerComponents, progress: TrainState) -> LoopStatus | None:
    """Carry out what is due, on the checkpoint of this step; how the loop ends where that was wished. Collective.

    Nothing is after the last step, whose export is measured by all tasks when the run finishes.
    """
    if not 0 < progress.step < parts.schedule.steps or not parts.in_training_tasks.has_due_tasks(progress.step):
        return None
    parts.checkpoint_manager.finalize_save()
    parts.goodput_tracker.enter_step(progress.step)
    wish = parts.in_training_tasks.run_due_tasks(progress.step)
    if wish is StopRequest.NONE:
        return None
    return "stopped" if wish is StopRequest.STOP else "left"


def await_rung_decision(parts: TrainerComponents, progress: TrainState) -> LoopStatus | None:
    """Wait for the answer whether this trial of a search goes on; one that does not needs no checkpoint. Collective."""
    context = parts.context
    if progress.step not in context.rungs:
        return None
    context.heartbeat.set_phase(f"waiting at the rung after step {progress.step}", NO_TIMEOUT)
    wish = context.broadcast_object(context.await_rung(progress.step) if context.is_rank_zero else StopRequest.NONE)
    return "stopped" if wish is StopRequest.STOP else None


def evaluate_held_out(parts: TrainerComponents, progress: TrainState) -> EvalLoss | None:
    """Measure the held-out loss now; None where nothing is held out. Collective."""
    context, feed = parts.context, parts.dataloader
    if feed.eval_loss_tokens == 0:
        return None
    batches = _iter_with_heartbeat(
        feed.get_eval_batches(context.rank, context.world_size, parts.plan.micro_batch), context.heartbeat
    )
    result = compute_eval_loss(parts.engine, batches, feed.eval_loss_tokens, feed.eval_bytes, context)
    parts.metrics.write(progress.step, result.to_metrics())
    parts.checkpoint_manager.record_eval_loss(progress.step, result.loss)
    if context.is_rank_zero:
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        context.report({"kind": "eval", "step": progress.step, **values})
    return result


def _iter_with_heartbeat(batches: Sequence[MicroBatch], pulse: Heartbeat) -> Iterator[MicroBatch]:
    """The batches of an evaluation, each of which is an advance."""
    for number, batch in enumerate(batches, start=1):
        pulse.set_phase(f"evaluating, batch {number} of {len(batches)}")
        yield batch
    pulse.set_phase("evaluating, adding up the losses")
