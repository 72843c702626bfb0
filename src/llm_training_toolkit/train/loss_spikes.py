"""Loss and gradient spikes: detection against the steps before (pure), and the skip or stop that follows.

A step is compared with the median of the last steps, in units of their median absolute deviation. Unlike mean and
standard deviation, both stay the same when a few of those steps were spikes themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from llm_training_toolkit.checkpoint.manager import CheckpointManager
from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats, TrainState
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import TrainingError

# Steps to compare with. This and 6 deviations are OLMo 2's (SkipStepAdamW in OLMo-core: rolling_interval_length 128,
# sigma_factor 6, there of mean and standard deviation, from half a window on).
SPIKE_WINDOW_STEPS = 128
MIN_SPIKE_STEPS = SPIKE_WINDOW_STEPS // 2  # before any step is judged: the first losses fall too fast for a baseline
_MAX_DEVIATIONS = 6.0
_MAD_TO_STD = 1.4826  # median absolute deviation to standard deviation, for normally distributed values
# Least deviation of losses, as a share of the median: a run with steady losses is not stopped below +12 %.
_LOSS_FLOOR = 0.02
# Nats: the least deviation of losses is this over the root of the step's loss tokens. One token's loss varies by 2 or 3
# nats, and neighbours vary together. A healthy run of 256 tokens a step went from 0.96 to 2.97 and back, 4.0 of these
# deviations. From 65,536 tokens a step on they are below 2 % of a loss of 1.6.
_TOKEN_FLOOR = 8.0
# Least deviation of the logarithm of gradient norms: below ten times the usual norm is no spike, because norms are
# skewed and clipping handles the common outliers.
_NORM_FLOOR = math.log(10.0) / _MAX_DEVIATIONS
MAX_CONSECUTIVE_SKIPS = 10  # more in a row are no spike, but the state of the run
SpikePolicy = Literal["stop", "skip", "ignore"]


def append_recent_step(recent: Sequence[StepStats], step: StepStats) -> tuple[StepStats, ...]:
    """Return the window with a step appended. Spikes count as well: if all steps are higher, that is the new median."""
    return (*recent[-(SPIKE_WINDOW_STEPS - 1) :], step)


def detect_spike(step: StepStats, loss_tokens: int, recent: Sequence[StepStats]) -> str | None:
    """Return a text that describes a step's spike; None if there is none, or too few steps are known.

    The step's loss is the mean over `loss_tokens` tokens.
    """
    if len(recent) < MIN_SPIKE_STEPS:
        return None
    chance = _TOKEN_FLOOR / math.sqrt(max(loss_tokens, 1))
    losses = [each.loss for each in recent]
    deviations, usual = _compute_deviations(step.loss, losses, floor=chance, relative_floor=_LOSS_FLOOR)
    if deviations > _MAX_DEVIATIONS:
        return f"the loss is {step.loss:.4g}, {deviations:.0f} deviations above its median of {usual:.4g}"
    logs = [_compute_log_norm(each.norm) for each in recent]
    deviations, usual = _compute_deviations(_compute_log_norm(step.norm), logs, floor=_NORM_FLOOR)
    if deviations > _MAX_DEVIATIONS:
        times = math.exp(_compute_log_norm(step.norm) - usual)
        return f"the gradient's norm is {step.norm:.4g}, {times:.0f} times its median of {math.exp(usual):.4g}"
    return None


def count_consecutive_skips(skips: Sequence[SkippedStep], step: int) -> int:
    """Return the number of updates skipped in a row, up to and including that of `step`."""
    left_out = {skip.step for skip in skips}
    length = 0
    while step - length in left_out:
        length += 1
    return length


def _compute_deviations(
    value: float, recent: Sequence[float], *, floor: float = 0.0, relative_floor: float = 0.0
) -> tuple[float, float]:
    """Return a value's deviations above the median of `recent`, and that median."""
    usual = statistics.median(recent)
    spread = _MAD_TO_STD * statistics.median(abs(each - usual) for each in recent)
    least = max(floor, relative_floor * abs(usual))
    return (value - usual) / max(spread, least, 1e-12), usual


def _compute_log_norm(norm: float) -> float:
    """Return the logarithm of a norm; a zero norm (a step with nothing to learn) counts as 1e-300."""
    return math.log(max(norm, 1e-300))


class SpikeGuard:
    """Spike check of one update, and the action after a spike."""

    def __init__(
        self, policy: SpikePolicy, context: RunContext, state: TrainState, loss: float, loss_tokens: int
    ) -> None:
        self._policy, self._context, self._state = policy, context, state
        self._loss, self._loss_tokens = loss, loss_tokens
        self.spike: str | None = None
        """Text that describes the spike; None if the update was allowed."""

    def allow_update(self, norm: float) -> bool:
        """Return whether to apply the update; the engine calls it with the gradient norm. Rank 0 decides for all.

        Collective once there are enough steps to compare with.
        """
        recent = self._state.recent
        if self._policy == "ignore" or len(recent) < MIN_SPIKE_STEPS:
            return True
        found = detect_spike(StepStats(self._loss, norm), self._loss_tokens, recent)
        [agreed] = self._context.all_reduce_sum(float(bool(found) and self._context.is_rank_zero))
        self.spike = (found or "rank 0 finds that it stands out") if agreed else None
        return not agreed

    def handle_spike(self, saver: CheckpointManager, loss_sum: float, documents: str) -> None:
        """Report the skipped update; `loss_sum` and `documents` are those of this rank. Collective.

        Raises TrainingError if that ends the run, after saving the state before the update.
        """
        step = self._state.step + 1
        _, highest = max(self._context.all_gather_object((loss_sum, documents)))
        what = f"step {step}: {self.spike} in the last {len(self._state.recent)} steps"
        holds = f"The rank with the highest loss had: {highest}"
        consecutive_skips = count_consecutive_skips(self._state.skips, self._state.step)
        if self._policy == "skip" and consecutive_skips < MAX_CONSECUTIVE_SKIPS:
            if self._context.is_rank_zero:
                message = f"{what}; this update is left out. {holds}"
                self._context.report(WarningEvent(message))
            return
        saver.begin_save(self._state)
        saved = f"a checkpoint of step {self._state.step} is saved. {holds}"
        if self._policy == "skip":
            raise TrainingError(
                f"{what}, after {consecutive_skips} updates in a row that were left out: that is no spike any more; "
                f"{saved}. failures.on_loss_spike=ignore takes the updates; an earlier checkpoint with a lower "
                "optim.lr (--accept optim.lr) may be what it needs"
            )
        raise TrainingError(
            f"{what}; stopped before this update, {saved}. "
            "failures.on_loss_spike=skip continues without it, failures.on_loss_spike=ignore takes it"
        )
