"""Work between two steps beside checkpoints: evaluation, tasks, rungs of a search, waiting for data.

A returned `LoopStatus` ends the loop, None continues it. All functions are collective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.data.collate import MicroBatch, build_full_batch
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import EvalEvent, NoteEvent
from llm_training_toolkit.distributed.heartbeat import NO_TIMEOUT, Heartbeat
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.evaluation.validation import EvalLoss, compute_eval_loss
from llm_training_toolkit.plan import compute_replica_slice
from llm_training_toolkit.train.components import LoopStatus, TrainerComponents

_POLL_SECONDS = 0.5  # between polls for data that is being prepared


def try_largest_micro_batch(components: TrainerComponents, step: int) -> None:
    """Run a micro-batch as large as any to come, before a step whose data every rank has. Collective.

    Otherwise the memory of a GPU may run out at the first step with many loss tokens, hours later.
    """
    context, dataloader = components.context, components.dataloader
    context.heartbeat.set_phase("trying the largest micro-batch")
    positions = compute_replica_slice(dataloader.count_sequences(step), components.replicas, components.replica)
    batch = build_full_batch(dataloader.read_micro_batch(step, positions[: components.plan.micro_batch]))
    # From the second micro-batch of a step on, the gradients of the first stand beside the activations.
    for _ in range(min(components.plan.get_accumulation_steps(components.replicas), 2)):
        components.engine.run_trial_pass(batch)


def wait_if_data_missing(components: TrainerComponents, state: TrainState) -> LoopStatus | None:
    """Call `wait_for_data` if some rank lacks the next step's data. Collective."""
    is_missing = state.step < components.lr_schedule.steps and not components.dataloader.has_step(state.step)
    [missing_count] = components.context.all_reduce_sum(is_missing)
    return wait_for_data(components, state) if missing_count else None


def wait_for_data(components: TrainerComponents, state: TrainState) -> LoopStatus | None:
    """Wait until every rank has the next step's data. A stop request ends the wait and the loop, after a save.

    Collective. Raises DataError on every rank when the data will never arrive.
    """
    context, dataloader = components.context, components.dataloader
    components.checkpoint_manager.finalize_save()  # the wait may be long, and the processes may be killed in it
    context.heartbeat.set_phase("waiting for data that is being prepared", NO_TIMEOUT)
    components.goodput_tracker.enter_category("data")
    if context.is_rank_zero:
        message = f"step {state.step + 1} waits for data of the next epoch or partition, which is being prepared"
        context.report(NoteEvent(message))
    while True:
        failure = ""
        try:
            if not dataloader.has_step(state.step):
                dataloader.refresh_epochs()
        except DataError as error:
            failure = str(error)
        stop_request = context.read_stop_request()
        replies = context.all_gather_object((dataloader.has_step(state.step), failure, stop_request))
        if failures := [failure for _, failure, _ in replies if failure]:
            raise DataError(failures[0])
        if (stop_request := replies[0][2]) is not StopRequest.NONE:
            if state != components.initial_state:  # the initial state is saved already, or is that of step 0
                components.checkpoint_manager.begin_save(state)
            return "stopped" if stop_request is StopRequest.STOP else "drained"
        if all(has for has, _, _ in replies):
            return None
        time.sleep(_POLL_SECONDS)


def run_tasks_if_due(components: TrainerComponents, state: TrainState) -> LoopStatus | None:
    """Run the tasks due after this step, on its checkpoint; a stop request ends the loop. Collective.

    After the last step no task is due: all tasks measure its export when the run finishes.
    """
    if not 0 < state.step < components.lr_schedule.steps or not components.in_training_tasks.has_due_tasks(state.step):
        return None
    components.checkpoint_manager.finalize_save()
    components.goodput_tracker.enter_step(state.step)
    stop_request = components.in_training_tasks.run_due_tasks(state.step)
    if stop_request is StopRequest.NONE:
        return None
    return "stopped" if stop_request is StopRequest.STOP else "drained"


def await_rung_decision(components: TrainerComponents, state: TrainState) -> LoopStatus | None:
    """Wait for the search to decide if this trial continues; a stopped one needs no checkpoint. Collective."""
    context = components.context
    if state.step not in context.rungs:
        return None
    context.heartbeat.set_phase(f"waiting at the rung after step {state.step}", NO_TIMEOUT)
    stop_request = context.broadcast_object(context.await_rung(state.step))
    return "stopped" if stop_request is StopRequest.STOP else None


def evaluate_held_out(components: TrainerComponents, state: TrainState) -> EvalLoss | None:
    """Measure the held-out loss now; return None if no data is held out. Collective."""
    context, dataloader = components.context, components.dataloader
    if dataloader.eval_loss_tokens == 0:
        return None
    batches = _iter_with_heartbeat(
        dataloader.get_eval_batches(components.replica, components.replicas, components.plan.micro_batch),
        context.heartbeat,
    )
    result = compute_eval_loss(components.engine, batches, dataloader.eval_loss_tokens, dataloader.eval_bytes, context)
    components.metrics.write(state.step, result.to_metrics())
    components.checkpoint_manager.record_eval_loss(state.step, result.loss)
    if context.is_rank_zero:
        context.report(EvalEvent(state.step, result.loss, result.bits_per_byte))
    return result


def _iter_with_heartbeat(batches: Sequence[MicroBatch], heartbeat: Heartbeat) -> Iterator[MicroBatch]:
    """Yield the batches of an evaluation, with a heartbeat phase for each."""
    for number, batch in enumerate(batches, start=1):
        heartbeat.set_phase(f"evaluating, batch {number} of {len(batches)}")
        yield batch
    heartbeat.set_phase("evaluating, adding up the losses")
