"""The training loop. It knows neither Ray nor DeepSpeed nor the command line.

    micro-batches of this rank -> gradients -> agree on loss and flags -> update -> metrics
    -> evaluation, checkpoint, stop, each when due

The worker builds the parts (`Parts`), the loop runs them from the step they stand at to the end.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from llm_training_toolkit.checkpoint.state import Progress, Skip, Taken
from llm_training_toolkit.distributed.context import Wish
from llm_training_toolkit.distributed.heartbeat import OUTSIDE_STEPS, WITHIN_A_STEP
from llm_training_toolkit.errors import DataError, TrainingError
from llm_training_toolkit.plan import slice_of
from llm_training_toolkit.train.components import Parts, Status
from llm_training_toolkit.train.hooks import at_rung, at_tasks, evaluate, wait_for_data, wait_where_data_lacks
from llm_training_toolkit.train.loss_spikes import Judge, remembered
from llm_training_toolkit.train.stragglers import Slowest, slowest


@dataclass(frozen=True)
class Flags:
    """What rank 0 decided after a step, the same on every rank."""

    wish: Wish
    save: bool
    written: bool
    """Every rank has written its part of the checkpoint that has begun."""
    wait: bool
    """Some rank lacks data of the next step: it is being prepared."""

    @property
    def status(self) -> Status | None:
        """How the loop ends after this step and its checkpoint; None = it goes on."""
        if self.wish is Wish.STOP:
            return "stopped"
        leave = self.wish is Wish.LEAVE or (self.wish is Wish.LEAVE_WHEN_SAVED and self.save)
        return "left" if leave else None


def train(parts: Parts) -> tuple[Status, Progress]:
    """Run from where the attempt begins to the end of the plan, or until somebody asks to stop or to leave.

    Raises TrainingError when the loss or the gradient is not finite.
    """
    progress = parts.origin
    if progress.step == 0:
        parts.account.enter("step")
        evaluate(parts, progress)
    try:
        status, progress = _steps(parts, progress)
    except (TrainingError, DataError):
        parts.saver.complete()  # all ranks raise it: the checkpoint on its way is of a step before
        raise
    parts.context.pulse.mark("completing the last checkpoint")
    parts.account.enter("checkpoint")
    parts.saver.complete()
    return status, progress


def _steps(parts: Parts, progress: Progress) -> tuple[Status, Progress]:
    """Step after step, each with what is due after it, to the end or to a wish to end."""
    steps = parts.schedule.steps
    # A group may begin where the data ends: the one before left, or was lost, while it waited for more.
    if (status := wait_where_data_lacks(parts, progress) or at_tasks(parts, progress)) is not None:
        return status, progress
    while progress.step < steps:
        progress, flags = optimizer_step(parts, progress)
        ended = progress.step == steps
        parts.account.enter("checkpoint")
        if flags.written:
            parts.saver.complete()
        if ended or flags.status or flags.save:
            parts.context.pulse.mark(f"saving a checkpoint of step {progress.step}")
            seconds = parts.saver.begin(progress)
            parts.metrics.write(progress.step, {"perf/checkpoint_seconds": seconds})
        if flags.status and not ended:
            parts.saver.complete()  # whoever asks to stop may not wait for an evaluation
        if ended or progress.step % parts.plan.eval_every == 0 or progress.step in parts.context.rungs:
            parts.account.enter_step(progress.step)
            evaluate(parts, progress)
        if ended:
            break
        status = flags.status or (wait_for_data(parts, progress) if flags.wait else None)
        # A rung is passed even by who is to stop: the checkpoint is of this step, and it would never be asked again.
        if status := at_rung(parts, progress) or status or at_tasks(parts, progress):
            return status, progress
    return "finished", progress


def optimizer_step(parts: Parts, progress: Progress) -> tuple[Progress, Flags]:
    """One step: gradients over this rank's share, one exchange between ranks, the update, the numbers."""
    started = time.perf_counter()
    context, plan, step = parts.context, parts.plan, progress.step
    patience = OUTSIDE_STEPS if progress == parts.origin else WITHIN_A_STEP  # the first step of an attempt compiles
    context.pulse.mark(f"step {step + 1}, reading its sequences", patience)
    parts.account.enter("data")
    positions = slice_of(parts.feed.sequences_in(step), context.world_size, context.rank)
    micro_batches = parts.feed.batch(step, positions, plan.micro_batch, plan.accumulation(context.world_size))
    loss_tokens = parts.feed.loss_tokens(step)
    # Whatever chance is left (dropout of loaded weights) comes from the step, so that a resume repeats it.
    torch.manual_seed(hash((parts.seed, step, context.rank)))
    data_seconds = time.perf_counter() - started
    parts.account.enter_step(step + 1)

    def begin(index: int) -> None:
        context.pulse.mark(f"step {step + 1}, micro-batch {index + 1} of {len(micro_batches)}", patience)

    loss_sum = parts.engine.accumulate(micro_batches, loss_tokens, begin)
    context.pulse.mark(f"step {step + 1}, adding up the losses", patience)
    # Under ZeRO 3 a forward pass waits for the others' weights: it tells nothing of this rank alone.
    own_seconds = data_seconds + parts.engine.forward_seconds if parts.engine.stage < 3 else 0.0
    total, flags, slow = _agree(parts, loss_sum, step + 1, own_seconds)
    loss = total / max(loss_tokens, 1)
    if not math.isfinite(loss):
        raise TrainingError(_not_finite(parts, step, positions, loss_sum, f"the loss is {loss}"))
    lr = parts.schedule.lr_at(step)
    context.pulse.mark(f"step {step + 1}, updating the weights", patience)
    judge = Judge(parts.on_spike, context, progress, loss, loss_tokens)
    norm = parts.engine.step(lr, judge.allow)
    if not math.isfinite(norm):
        raise TrainingError(_not_finite(parts, step, positions, math.nan, "the gradient is not finite"))
    if judge.spike:
        judge.settle(parts.saver, loss_sum, parts.feed.names(step, positions))
    values = {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": norm, "perf/data_seconds": data_seconds}
    if slow is not None:
        values |= {"perf/slowest_rank": float(slow.rank), "perf/slowest_ratio": slow.ratio}
        _watch_pace(parts, slow)
    _record(parts, progress, started, values | ({"optim/skipped": 1.0} if judge.spike else {}))
    return _advanced(parts, progress, Taken(loss, norm), skipped=bool(judge.spike)), flags


def _advanced(parts: Parts, before: Progress, taken: Taken, *, skipped: bool) -> Progress:
    """How far the run has come with a step more."""
    seen = parts.feed.sequences_in(before.step)
    skip = (Skip(before.step + 1, before.sequences, seen),) if skipped else ()
    return Progress(
        before.step + 1,
        before.tokens + seen * parts.plan.sequence_length,
        before.sequences + seen,
        before.skips + skip,
        remembered(before.recent, taken),
    )


def _watch_pace(parts: Parts, step: Slowest) -> None:
    """Name a rank that holds up the others, once."""
    lasting = parts.pace.see(step)
    if lasting is not None and parts.context.is_first:
        parts.context.report({"kind": "slow", "rank": lasting.rank, "ratio": lasting.ratio})


def _agree(parts: Parts, loss_sum: float, completed: int, own_seconds: float) -> tuple[float, Flags, Slowest | None]:
    """The loss summed over ranks, rank 0's decisions, and the slowest rank, in one exchange."""
    context = parts.context
    wish = context.wish() if context.is_first else Wish.GO_ON
    save = context.is_first and (parts.saver.due(completed) or parts.midway.due(completed))
    lacks = completed < parts.schedule.steps and not parts.feed.has(completed)
    own = [own_seconds if rank == context.rank else 0.0 for rank in range(context.world_size)]
    mine = (loss_sum, wish, save, parts.saver.is_writing, lacks)
    total, wishes, saves, writing, lacking, *seconds = context.sum(*mine, *own)
    written = parts.saver.has_begun and not writing
    return total, Flags(Wish(round(wishes)), save=saves > 0, written=written, wait=lacking > 0), slowest(seconds)


def _not_finite(parts: Parts, step: int, positions: range, loss_sum: float, what: str) -> str:
    """Name the step and the sequences of the ranks whose own loss was not finite. Collective."""
    mine = "" if math.isfinite(loss_sum) else parts.feed.names(step, positions)
    named = "; ".join(text for text in parts.context.gather(mine) if text)
    return (
        f"step {step + 1}: {what}; training stopped and nothing of this step was saved. It holds: {named}. "
        "Look at these documents, or lower optim.lr (it needs --accept optim.lr) and go on from the last checkpoint"
    )


def _record(parts: Parts, before: Progress, started: float, values: dict[str, float]) -> None:
    """Write the numbers of a step and tell the person at the keyboard."""
    seconds = time.perf_counter() - started
    completed = before.step + 1
    tokens = parts.feed.sequences_in(before.step) * parts.plan.sequence_length
    values |= {
        "train/tokens": float(before.tokens + tokens),
        "perf/tokens_per_second": tokens / seconds,
        "perf/step_seconds": seconds,
        "perf/memory_gb": parts.engine.peak_memory_gb(),
    }
    parts.metrics.write(completed, values | parts.account.values())
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
                "time": time.time(),
            }
        )
