"""The training loop. It knows neither Ray nor DeepSpeed nor the command line.

    micro-batches of this rank -> gradients -> agree on loss and flags -> update -> metrics
    -> evaluation, checkpoint, stop, each when due

The worker builds the parts (`Parts`), the loop runs them from the step they stand at to the end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch

from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.evaluate import Batch, HeldOut, held_out
from llm_training_toolkit.metrics import Metrics
from llm_training_toolkit.plan import Plan, Schedule, slice_of

Status = Literal["finished", "stopped"]


@dataclass(frozen=True)
class Progress:
    """How far the run has come."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Tokens seen, padding included."""


class Steps(Protocol):
    """The engine, as the loop uses it."""

    def accumulate(self, micro_batches: Sequence[Batch], loss_tokens: int) -> float:
        """Gradients of this rank's micro-batches; the sum of their token losses."""

    def step(self, lr: float) -> float:
        """The update; the gradient's norm."""

    def evaluate(self, batch: Batch) -> float:
        """Sum of the token losses, no gradients."""

    def peak_memory_gb(self) -> float:
        """Largest memory used so far."""


class Order(Protocol):
    """The data, as the loop uses it: a pure function of the step."""

    def sequences_in(self, step: int) -> int:
        """Sequences of the step: the global batch, or fewer in the last step of a run over epochs."""

    def loss_tokens(self, step: int) -> int:
        """Loss tokens of the step's global batch."""

    def batch(self, step: int, positions: range, micro_batch: int, count: int) -> Sequence[Batch]:
        """Micro-batches of this rank's positions in the global batch, `count` of them, the last ones may be empty."""

    def eval_batches(self, rank: int, world_size: int, micro_batch: int) -> Sequence[Batch]:
        """This rank's share of the held-out batches; as many on every rank."""

    def names(self, step: int, positions: range) -> str:
        """Which documents lie at these positions, in words."""

    @property
    def eval_tokens(self) -> int:
        """Loss tokens of the held-out part."""

    @property
    def eval_bytes(self) -> int:
        """Bytes those tokens stand for."""


class Saver(Protocol):
    """Saves checkpoints and knows when one is due."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step; asked on rank 0."""

    def save(self, progress: Progress) -> float:
        """Write a checkpoint; seconds it took. Collective."""


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    plan: Plan
    schedule: Schedule
    seed: int
    context: RunContext
    engine: Steps
    order: Order
    saver: Saver
    metrics: Metrics


@dataclass(frozen=True)
class Flags:
    """What rank 0 decided after a step, the same on every rank."""

    stop: bool
    save: bool


def train(parts: Parts, progress: Progress) -> tuple[Status, Progress]:
    """Run from `progress` to the end of the plan, or to a stop that somebody asked for.

    Raises TrainingError when the loss or the gradient is not finite.
    """
    steps = parts.schedule.steps
    if progress.step == 0:
        evaluate(parts, progress)
    clock = time.perf_counter()
    while progress.step < steps:
        flags = optimizer_step(parts, progress, clock)
        clock = time.perf_counter()
        progress = replace(progress, step=progress.step + 1, tokens=progress.tokens + _tokens(parts, progress.step))
        ended = progress.step == steps
        if ended or progress.step % parts.plan.eval_every == 0:
            evaluate(parts, progress)
        if ended or flags.stop or flags.save:
            seconds = parts.saver.save(progress)
            parts.metrics.write(progress.step, {"perf/checkpoint_seconds": seconds})
        if flags.stop and not ended:
            return "stopped", progress
    return "finished", progress


def _tokens(parts: Parts, step: int) -> int:
    return parts.order.sequences_in(step) * parts.plan.sequence_length


def optimizer_step(parts: Parts, progress: Progress, started: float) -> Flags:
    """One step: gradients over this rank's share, one exchange between ranks, the update, the numbers."""
    context, plan, step = parts.context, parts.plan, progress.step
    positions = slice_of(parts.order.sequences_in(step), context.world_size, context.rank)
    micro_batches = parts.order.batch(step, positions, plan.micro_batch, plan.accumulation(context.world_size))
    loss_tokens = parts.order.loss_tokens(step)
    # Whatever chance is left (dropout of loaded weights) comes from the step, so that a resume repeats it.
    torch.manual_seed(hash((parts.seed, step, context.rank)))
    data_seconds = time.perf_counter() - started

    loss_sum = parts.engine.accumulate(micro_batches, loss_tokens)
    total, flags = _agree(parts, loss_sum, step + 1)
    loss = total / loss_tokens
    if not math.isfinite(loss):
        raise TrainingError(_not_finite(parts, step, positions, loss_sum, f"the loss is {loss}"))
    lr = parts.schedule.lr_at(step)
    norm = parts.engine.step(lr)
    if not math.isfinite(norm):
        raise TrainingError(_not_finite(parts, step, positions, math.nan, "the gradient is not finite"))
    _record(parts, step + 1, started, data_seconds, {"train/loss": loss, "optim/lr": lr, "optim/grad_norm": norm})
    return flags


def _agree(parts: Parts, loss_sum: float, completed: int) -> tuple[float, Flags]:
    """The loss summed over ranks, and rank 0's decisions, in one exchange."""
    context = parts.context
    stop = context.is_first and context.stop_requested()
    save = context.is_first and parts.saver.due(completed)
    total, stops, saves = context.sum(loss_sum, stop, save)
    return total, Flags(stop=stops > 0, save=saves > 0)


def _not_finite(parts: Parts, step: int, positions: range, loss_sum: float, what: str) -> str:
    """Name the step and the sequences of the ranks whose own loss was not finite. Collective."""
    mine = "" if math.isfinite(loss_sum) else parts.order.names(step, positions)
    named = "; ".join(text for text in parts.context.gather(mine) if text)
    return (
        f"step {step + 1}: {what}; training stopped and nothing of this step was saved. It holds: {named}. "
        "Look at these documents, lower optim.lr, or resume from an earlier checkpoint with another data order (run.seed)"
    )


def _record(parts: Parts, completed: int, started: float, data_seconds: float, values: dict[str, float]) -> None:
    """Write the numbers of a step and tell the person at the keyboard."""
    seconds = time.perf_counter() - started
    tokens = _tokens(parts, completed - 1)
    values |= {
        "train/tokens": float(completed * parts.plan.tokens_per_step),
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
    context, order = parts.context, parts.order
    if order.eval_tokens == 0:
        return None
    batches = order.eval_batches(context.rank, context.world_size, parts.plan.micro_batch)
    result = held_out(parts.engine, batches, order.eval_tokens, order.eval_bytes, context)
    parts.metrics.write(progress.step, result.values())
    if context.is_first:
        values = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        context.report({"kind": "eval", "step": progress.step, **values})
    return result


__all__ = ["Flags", "Order", "Parts", "Progress", "Saver", "Status", "Steps", "evaluate", "train"]
