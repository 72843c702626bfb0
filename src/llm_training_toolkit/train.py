"""The training loop. It knows neither Ray nor DeepSpeed nor the command line.

    micro-batches of this rank -> gradients -> agree on loss and flags -> update -> metrics
    -> evaluation, checkpoint, stop, each when due

The worker builds the parts (`Parts`), the loop runs them from the step they stand at to the end.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from llm_training_toolkit.context import RunContext
from llm_training_toolkit.data.feed import Feed
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.errors import DataError, TrainingError
from llm_training_toolkit.evaluation.held_out import HeldOut, held_out
from llm_training_toolkit.metrics import Metrics
from llm_training_toolkit.plan import Plan, Schedule, slice_of
from llm_training_toolkit.saving import CheckpointSaver, Progress

_LOOK_SECONDS = 0.5
"""Between looks for data that is being prepared."""

Status = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    plan: Plan
    schedule: Schedule
    seed: int
    context: RunContext
    engine: Engine
    feed: Feed
    saver: CheckpointSaver
    metrics: Metrics


@dataclass(frozen=True)
class Flags:
    """What rank 0 decided after a step, the same on every rank."""

    stop: bool
    save: bool
    written: bool
    """Every rank has written its part of the checkpoint that has begun."""
    wait: bool
    """Some rank lacks data of the next step: it is being prepared."""


def train(parts: Parts, progress: Progress) -> tuple[Status, Progress]:
    """Run from `progress` to the end of the plan, or to a stop that somebody asked for.

    Raises TrainingError when the loss or the gradient is not finite.
    """
    steps = parts.schedule.steps
    if progress.step == 0:
        evaluate(parts, progress)
    try:
        progress = _steps(parts, progress)
    except (TrainingError, DataError):
        parts.saver.complete()  # all ranks raise it: the checkpoint on its way is of a step before
        raise
    parts.saver.complete()
    return "finished" if progress.step == steps else "stopped", progress


def _steps(parts: Parts, progress: Progress) -> Progress:
    """Step after step, each with what is due after it, to the end or to a stop."""
    steps = parts.schedule.steps
    while progress.step < steps:
        flags = optimizer_step(parts, progress)
        seen = parts.feed.sequences_in(progress.step)
        tokens = progress.tokens + seen * parts.plan.sequence_length
        progress = Progress(progress.step + 1, tokens, progress.sequences + seen)
        ended = progress.step == steps
        if ended or progress.step % parts.plan.eval_every == 0:
            evaluate(parts, progress)
        if flags.written:
            parts.saver.complete()
        if ended or flags.stop or flags.save:
            seconds = parts.saver.begin(progress)
            parts.metrics.write(progress.step, {"perf/checkpoint_seconds": seconds})
        if flags.stop or (flags.wait and not wait_for_data(parts, progress)):
            break
    return progress


def optimizer_step(parts: Parts, progress: Progress) -> Flags:
    """One step: gradients over this rank's share, one exchange between ranks, the update, the numbers."""
    started = time.perf_counter()
    context, plan, step = parts.context, parts.plan, progress.step
    positions = slice_of(parts.feed.sequences_in(step), context.world_size, context.rank)
    micro_batches = parts.feed.batch(step, positions, plan.micro_batch, plan.accumulation(context.world_size))
    loss_tokens = parts.feed.loss_tokens(step)
    # Whatever chance is left (dropout of loaded weights) comes from the step, so that a resume repeats it.
    torch.manual_seed(hash((parts.seed, step, context.rank)))
    data_seconds = time.perf_counter() - started

    loss_sum = parts.engine.accumulate(micro_batches, loss_tokens)
    total, flags = _agree(parts, loss_sum, step + 1)
    loss = total / max(loss_tokens, 1)
    if not math.isfinite(loss):
        raise TrainingError(_not_finite(parts, step, positions, loss_sum, f"the loss is {loss}"))
    lr = parts.schedule.lr_at(step)
    norm = parts.engine.step(lr)
    if not math.isfinite(norm):
        raise TrainingError(_not_finite(parts, step, positions, math.nan, "the gradient is not finite"))
    _record(parts, progress, started, data_seconds, {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": norm})
    return flags


def _agree(parts: Parts, loss_sum: float, completed: int) -> tuple[float, Flags]:
    """The loss summed over ranks, and rank 0's decisions, in one exchange."""
    context = parts.context
    stop = context.is_first and context.stop_requested()
    save = context.is_first and parts.saver.due(completed)
    lacks = completed < parts.schedule.steps and not parts.feed.has(completed)
    total, stops, saves, writing, lacking = context.sum(loss_sum, stop, save, parts.saver.is_writing, lacks)
    written = parts.saver.has_begun and not writing
    return total, Flags(stop=stops > 0, save=saves > 0, written=written, wait=lacking > 0)


def wait_for_data(parts: Parts, progress: Progress) -> bool:
    """Wait until every rank has the data of the next step; False where a stop came first, with a checkpoint of now.

    Collective. Raises DataError on every rank when it will never be there.
    """
    context, feed = parts.context, parts.feed
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
        answers = context.gather((feed.has(progress.step), failure, context.is_first and context.stop_requested()))
        if failures := [failure for _, failure, _ in answers if failure]:
            raise DataError(failures[0])
        if any(stop for _, _, stop in answers):
            parts.saver.begin(progress)
            return False
        if all(has for has, _, _ in answers):
            return True
        time.sleep(_LOOK_SECONDS)


def _not_finite(parts: Parts, step: int, positions: range, loss_sum: float, what: str) -> str:
    """Name the step and the sequences of the ranks whose own loss was not finite. Collective."""
    mine = "" if math.isfinite(loss_sum) else parts.feed.names(step, positions)
    named = "; ".join(text for text in parts.context.gather(mine) if text)
    return (
        f"step {step + 1}: {what}; training stopped and nothing of this step was saved. It holds: {named}. "
        "Look at these documents, or lower optim.lr (it needs --accept optim.lr) and go on from the last checkpoint"
    )


def _record(parts: Parts, before: Progress, started: float, data_seconds: float, values: dict[str, float]) -> None:
    """Write the numbers of a step and tell the person at the keyboard."""
    seconds = time.perf_counter() - started
    completed = before.step + 1
    tokens = parts.feed.sequences_in(before.step) * parts.plan.sequence_length
    values |= {
        "train/tokens": float(before.tokens + tokens),
        "perf/tokens_per_second": tokens / seconds,
        "perf/step_seconds": seconds,
        "perf/data_seconds": data_seconds,
        "perf/memory_gb": parts.engine.peak_memory_gb(),
    }
    parts.metrics.write(completed, values)
    if parts.context.is_first:
        parts.context.report(
            {
                "kind": "step",
                "step": completed,
                "steps": parts.schedule.steps,
                "loss": values["train/loss"],
                "lr": values["optim/lr"],
                "tokens_per_second": values["perf/tokens_per_second"],
                "seconds": seconds,
            }
        )


def evaluate(parts: Parts, progress: Progress) -> HeldOut | None:
    """Measure the held-out loss now; None where nothing is held out. Collective."""
    context, feed = parts.context, parts.feed
    if feed.eval_tokens == 0:
        return None
    batches = feed.eval_batches(context.rank, context.world_size, parts.plan.micro_batch)
    result = held_out(parts.engine, batches, feed.eval_tokens, feed.eval_bytes, context)
    parts.metrics.write(progress.step, result.values())
    if context.is_first:
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        context.report({"kind": "eval", "step": progress.step, **values})
    return result
