"""Training loop, independent of Ray, DeepSpeed and the command line.

    micro-batches of this rank -> gradients -> all-reduce loss and flags -> update -> metrics
    -> evaluation, checkpoint, stop, each when due

The worker builds `TrainerComponents`; the loop runs from their `initial_state` to the end of the plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.profiler import record_function

from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats, TrainState
from llm_training_toolkit.data.collate import MicroBatch, count_attended_tokens
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import StepEvent, StragglerEvent
from llm_training_toolkit.distributed.heartbeat import NON_STEP_TIMEOUT_FACTOR, STEP_TIMEOUT_FACTOR
from llm_training_toolkit.errors import DataError, TrainingError
from llm_training_toolkit.models.init_weights import derive_seed
from llm_training_toolkit.plan import compute_replica_slice
from llm_training_toolkit.train.components import LoopStatus, TrainerComponents
from llm_training_toolkit.train.hooks import (
    await_rung_decision,
    evaluate_held_out,
    run_tasks_if_due,
    try_largest_micro_batch,
    wait_for_data,
    wait_if_data_missing,
)
from llm_training_toolkit.train.loss_spikes import SpikeGuard, append_recent_step
from llm_training_toolkit.train.stragglers import Straggler, find_slowest_rank


@dataclass(frozen=True)
class StepDecision:
    """Decisions after a step, agreed between the ranks: a stop and a save by rank 0, the others over all ranks."""

    stop_request: StopRequest
    save_due: bool
    write_finished: bool
    """Every rank has written its part of the pending checkpoint."""
    data_missing: bool
    """Some rank lacks the next step's data, which is being prepared."""

    @property
    def loop_status(self) -> LoopStatus | None:
        """Status that ends the loop after this step and its checkpoint; otherwise None."""
        if self.stop_request is StopRequest.STOP:
            return "stopped"
        should_drain = self.stop_request is StopRequest.DRAIN or (
            self.stop_request is StopRequest.DRAIN_AFTER_CHECKPOINT and self.save_due
        )
        return "drained" if should_drain else None


@dataclass(frozen=True)
class StepData:
    """Share of a rank's replica in a step's data."""

    sample_indices: range
    """Positions in the step's global batch."""
    micro_batches: Sequence[MicroBatch]
    """As many as on every rank, the last ones of padding alone."""
    loss_tokens: int
    """Loss tokens of the whole global batch."""
    attended_tokens: int
    """As `count_attended_tokens` counts them, without padding micro-batches; 0 but on the replica's first rank."""


@dataclass(frozen=True)
class StepResults:
    """Results of a step, the same on every rank."""

    loss_sum: float
    attended_tokens: float
    decision: StepDecision
    slowest_rank: Straggler | None


def run_training_loop(components: TrainerComponents) -> tuple[LoopStatus, TrainState]:
    """Run from the initial state to the end of the plan, or until a stop or drain request.

    Raises TrainingError when the loss or the gradient is not finite, or at a spike that ends the run.
    """
    state = components.initial_state
    if state.step == 0:
        components.goodput_tracker.enter_category("step")
        evaluate_held_out(components, state)
    try:
        status, state = _run_steps(components, state)
    except (TrainingError, DataError):
        components.checkpoint_manager.finalize_save()  # raised on all ranks; an earlier step is pending
        raise
    finally:
        components.step_profiler.close()
    components.context.heartbeat.set_phase("completing the last checkpoint")
    components.goodput_tracker.enter_category("checkpoint")
    components.checkpoint_manager.finalize_save()
    return status, state


def _run_steps(components: TrainerComponents, state: TrainState) -> tuple[LoopStatus, TrainState]:
    """Run step after step, each with the work due after it, to the end of the plan or a stop request."""
    steps = components.lr_schedule.steps
    # A worker group may start where the data ends: the previous one drained or died while waiting for more.
    if (status := wait_if_data_missing(components, state) or run_tasks_if_due(components, state)) is not None:
        return status, state
    if state.step < steps and components.context.device.type == "cuda":
        try_largest_micro_batch(components, state.step)
    while state.step < steps:
        with components.step_profiler.record_step(state.step + 1):
            state, decision = train_step(components, state)
        ended = state.step == steps
        components.goodput_tracker.enter_category("checkpoint")
        if decision.write_finished:
            components.checkpoint_manager.finalize_save()
        if ended or decision.loop_status or decision.save_due:
            components.context.heartbeat.set_phase(f"saving a checkpoint of step {state.step}")
            seconds = components.checkpoint_manager.begin_save(state)
            components.metrics.write(state.step, {"perf/checkpoint_seconds": seconds})
        if decision.loop_status and not ended:
            components.checkpoint_manager.finalize_save()  # first, since a stop may leave no time for an evaluation
        if ended or state.step % components.plan.eval_every == 0 or state.step in components.context.rungs:
            components.goodput_tracker.enter_step(state.step)
            evaluate_held_out(components, state)
        if ended:
            break
        status = decision.loop_status or (wait_for_data(components, state) if decision.data_missing else None)
        # Wait at the rung even if a stop is pending: a resumed trial starts after this step and would never ask.
        if status := await_rung_decision(components, state) or status or run_tasks_if_due(components, state):
            return status, state
    return "finished", state


def train_step(components: TrainerComponents, state: TrainState) -> tuple[TrainState, StepDecision]:
    """Run one step: gradients of this rank's share, one all-reduce of scalars, the update, the metrics."""
    started = time.perf_counter()
    context, step = components.context, state.step
    # The first step of an attempt compiles.
    timeout_factor = NON_STEP_TIMEOUT_FACTOR if state == components.initial_state else STEP_TIMEOUT_FACTOR
    context.heartbeat.set_phase(f"step {step + 1}, reading its sequences", timeout_factor)
    components.goodput_tracker.enter_category("data")
    with record_function("read data"):
        data = _read_step_data(components, step)
    positions = data.sample_indices
    # Seeded by the step in case a kernel draws from the global generator: LoRA dropout has its own, others are 0.
    torch.manual_seed(derive_seed(components.seed, f"step {step}, rank {context.rank}"))
    data_seconds = time.perf_counter() - started
    components.goodput_tracker.enter_step(step + 1)

    def set_micro_batch_phase(index: int) -> None:
        context.heartbeat.set_phase(
            f"step {step + 1}, micro-batch {index + 1} of {len(data.micro_batches)}", timeout_factor
        )

    loss_sum = components.engine.forward_backward(data.micro_batches, data.loss_tokens, set_micro_batch_phase)
    context.heartbeat.set_phase(f"step {step + 1}, adding up the losses", timeout_factor)
    # A forward pass that waits for other ranks' weights or tokens measures them too.
    waits = components.engine.stage == 3 or components.plan.ranks_per_replica > 1
    own_seconds = 0.0 if waits else data_seconds + components.engine.forward_seconds
    results = _all_reduce_step_results(components, loss_sum, step + 1, own_seconds, data.attended_tokens)
    loss, straggler = results.loss_sum / max(data.loss_tokens, 1), results.slowest_rank
    if not math.isfinite(loss):
        raise TrainingError(_format_non_finite_error(components, step, positions, loss_sum, f"the loss is {loss}"))
    lr = components.lr_schedule.compute_lr(step)
    context.heartbeat.set_phase(f"step {step + 1}, updating the weights", timeout_factor)
    spike_guard = SpikeGuard(components.on_spike, context, state, loss, data.loss_tokens)
    norm = components.engine.optim_step(lr, spike_guard.allow_update)
    if not math.isfinite(norm):
        raise TrainingError(
            _format_non_finite_error(components, step, positions, math.nan, "the gradient is not finite")
        )
    values = {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": norm, "perf/data_seconds": data_seconds}
    values |= components.engine.compute_router_statistics(data.loss_tokens)
    if spike_guard.spike:
        values["optim/skipped"] = 1.0
        document_names = components.dataloader.format_document_names(step, positions)
        spike_guard.handle_spike(components.checkpoint_manager, loss_sum, document_names)
    if straggler is not None:
        values |= {"perf/slowest_rank": float(straggler.rank), "perf/slowest_ratio": straggler.ratio}
        _report_straggler(components, straggler)
    values |= _compute_speed_metrics(components, step, started, data.loss_tokens, results.attended_tokens)
    _record_step(components, state, values)
    return _advance_state(components, state, StepStats(loss, norm), skipped=bool(spike_guard.spike)), results.decision


def _read_step_data(components: TrainerComponents, step: int) -> StepData:
    """Read this rank's share of a step, and begin with that of the next one."""
    plan, dataloader = components.plan, components.dataloader
    sample_indices = compute_replica_slice(dataloader.count_sequences(step), components.replicas, components.replica)
    micro_batches = dataloader.get_micro_batches(
        step, sample_indices, plan.micro_batch, plan.get_accumulation_steps(components.replicas)
    )
    _prefetch_step(components, step + 1)
    own_micro_batches = micro_batches[: -(-len(sample_indices) // plan.micro_batch)]  # padding follows them
    if components.context.rank % plan.ranks_per_replica:
        own_micro_batches = []  # counted by the first rank of the replica
    return StepData(
        sample_indices,
        micro_batches,
        dataloader.count_loss_tokens(step),
        count_attended_tokens(own_micro_batches, components.compute_meter.flops.window),
    )


def _prefetch_step(components: TrainerComponents, step: int) -> None:
    """Begin to read this rank's part of a later step, if the run has that step and its data are prepared."""
    dataloader = components.dataloader
    if step < components.lr_schedule.steps and dataloader.has_step(step):
        own = compute_replica_slice(dataloader.count_sequences(step), components.replicas, components.replica)
        dataloader.prefetch(step, own, components.plan.micro_batch)


def _advance_state(components: TrainerComponents, state: TrainState, stats: StepStats, *, skipped: bool) -> TrainState:
    """Return the state after one more step."""
    seen = components.dataloader.count_sequences(state.step)
    skip = (SkippedStep(state.step + 1, state.sequences, seen),) if skipped else ()
    return TrainState(
        state.step + 1,
        state.tokens + seen * components.plan.sequence_length,
        state.sequences + seen,
        state.skips + skip,
        append_recent_step(state.recent, stats),
    )


def _report_straggler(components: TrainerComponents, straggler: Straggler) -> None:
    """Report a rank that slows down the others, once per rank."""
    persistent = components.straggler_detector.observe_step(straggler)
    if persistent is not None and components.context.is_rank_zero:
        components.context.report(StragglerEvent(persistent.rank, persistent.ratio))


def _all_reduce_step_results(
    components: TrainerComponents, loss_sum: float, completed: int, own_seconds: float, attended_tokens: int
) -> StepResults:
    """Return this rank's values summed over ranks, the common decision and the slowest rank, from one all-reduce."""
    context = components.context
    stop_request = context.read_stop_request()
    save_due = context.is_rank_zero and (
        components.checkpoint_manager.is_due(completed) or components.in_training_tasks.has_due_tasks(completed)
    )
    is_missing = completed < components.lr_schedule.steps and not components.dataloader.has_step(completed)
    local_seconds = [own_seconds if rank == context.rank else 0.0 for rank in range(context.world_size)]
    own_values = (loss_sum, stop_request, save_due, components.checkpoint_manager.is_writing, is_missing)
    total, stop_sum, save_sum, writing_count, missing_count, *seconds, attended = context.all_reduce_sum(
        *own_values, *local_seconds, attended_tokens
    )
    written = components.checkpoint_manager.has_pending_checkpoint and not writing_count
    decision = StepDecision(
        StopRequest(round(stop_sum)), save_due=save_sum > 0, write_finished=written, data_missing=missing_count > 0
    )
    return StepResults(total, attended, decision, find_slowest_rank(seconds))


def _format_non_finite_error(
    components: TrainerComponents, step: int, sample_indices: range, loss_sum: float, what: str
) -> str:
    """Build the message with the step and the sequences of ranks whose own loss is not finite. Collective."""
    mine = "" if math.isfinite(loss_sum) else components.dataloader.format_document_names(step, sample_indices)
    document_names = "; ".join(dict.fromkeys(text for text in components.context.all_gather_object(mine) if text))
    return (
        f"step {step + 1}: {what}; training stopped and nothing of this step was saved. It holds: {document_names}. "
        "Look at these documents, or lower optim.lr (it needs --accept optim.lr) and resume from the last checkpoint"
    )


def _compute_speed_metrics(
    components: TrainerComponents, step: int, started: float, loss_tokens: int, attended_tokens: float
) -> dict[str, float]:
    """Return the speed of a step that began at `started` and ends now."""
    seconds = time.perf_counter() - started
    tokens = components.dataloader.count_sequences(step) * components.plan.sequence_length
    meter_metrics = components.compute_meter.compute_metrics(
        tokens=tokens,
        loss_tokens=loss_tokens,
        attended_tokens=attended_tokens,
        device_seconds=seconds * components.context.world_size,
    )
    return {"perf/tokens_per_second": tokens / seconds, "perf/step_seconds": seconds, **meter_metrics}


def _record_step(components: TrainerComponents, state: TrainState, values: dict[str, float]) -> None:
    """Write a step's metrics, and report them to the user from rank 0."""
    completed = state.step + 1
    tokens = components.dataloader.count_sequences(state.step) * components.plan.sequence_length
    values |= {
        "train/tokens": float(state.tokens + tokens),
        "perf/memory_gb": components.engine.peak_memory_gb(),
    }
    components.metrics.write(completed, values | components.goodput_tracker.compute_metrics())
    if components.context.is_rank_zero:
        components.context.report(
            StepEvent(
                step=completed,
                steps=components.lr_schedule.steps,
                loss=values["train/loss"],
                lr=values["optim/lr"],
                tokens_per_second=values["perf/tokens_per_second"],
                seconds=values["perf/step_seconds"],
                time=time.time(),
                tflops=values["perf/tflops"],
                mfu=values.get("perf/mfu"),
            )
        )
