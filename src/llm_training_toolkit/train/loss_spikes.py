"""Whether a step's loss or gradient stands out from the steps before it. Pure.

A step is compared with the median of the last steps, in units of their median absolute deviation: unlike mean and
standard deviation, both stay where they are when a few of those steps were spikes themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from llm_training_toolkit.checkpoint.manager import CheckpointManager
from llm_training_toolkit.checkpoint.state import SkippedStep, StepStats, TrainState
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import TrainingError

SPIKE_WINDOW_STEPS = 128
"""Steps that are looked back on. This and 6 deviations are what OLMo 2 was trained with (SkipStepAdamW in OLMo-core:
rolling_interval_length 128, sigma_factor 6, there of mean and standard deviation; half a window before it begins)."""
MIN_SPIKE_STEPS = SPIKE_WINDOW_STEPS // 2
"""Steps to have seen before any is judged: the first ones fall too fast to say what is usual."""
_MAX_DEVIATIONS = 6.0
_MAD_TO_STD = 1.4826
"""Median absolute deviation to standard deviation, where values are normally distributed."""
_LOSS_FLOOR = 0.02
"""Of the median: the least deviation of losses, so that a run whose losses hardly vary is not stopped below +12 %."""
_TOKEN_FLOOR = 8.0
"""Nats: the least deviation of losses is this over the root of the step's loss tokens. One token's loss varies by 2 or
3 nats, and neighbours vary together. A healthy run of 256 tokens a step went from 0.96 to 2.97 and back, 4.0 of these
deviations; from 65,536 tokens a step on they are below 2 % of a loss of 1.6."""
_NORM_FLOOR = math.log(10.0) / _MAX_DEVIATIONS
"""The least deviation of the logarithm of gradient norms. They are skewed, and clipping takes care of the common
outliers: less than ten times the usual one is none."""
MAX_CONSECUTIVE_SKIPS = 10
"""Updates that may be left out one after another: beyond that it is no spike but how the run stands."""
SpikePolicy = Literal["stop", "skip", "ignore"]


def append_recent_step(recent: Sequence[StepStats], step: StepStats) -> tuple[StepStats, ...]:
    """The steps to compare the next one with. Spikes are among them: where all steps are higher, that is usual."""
    return (*recent[-(SPIKE_WINDOW_STEPS - 1) :], step)


def detect_spike(step: StepStats, loss_tokens: int, recent: Sequence[StepStats]) -> str:
    """How a step stands out from those before it, in words; empty where it does not, or too few are known.

    loss_tokens: of which the step's loss is the mean.
    """
    if len(recent) < MIN_SPIKE_STEPS:
        return ""
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
    return ""


def count_consecutive_skips(skips: Sequence[SkippedStep], step: int) -> int:
    """How many updates in a row were left out, the last of them that of `step`."""
    left_out = {skip.step for skip in skips}
    length = 0
    while step - length in left_out:
        length += 1
    return length


def _compute_deviations(
    value: float, recent: Sequence[float], *, floor: float = 0.0, relative_floor: float = 0.0
) -> tuple[float, float]:
    """How many deviations a value lies above the median of others, and that median."""
    usual = statistics.median(recent)
    spread = _MAD_TO_STD * statistics.median(abs(each - usual) for each in recent)
    least = max(floor, relative_floor * abs(usual))
    return (value - usual) / max(spread, least, 1e-12), usual


def _compute_log_norm(norm: float) -> float:
    """The logarithm of a norm; of zero, where a step has nothing to learn, that of the smallest number there is."""
    return math.log(max(norm, 1e-300))


class SpikeGuard:
    """Judges one update, and says what follows where it is left out."""

    def __init__(
        self, policy: SpikePolicy, context: RunContext, progress: TrainState, loss: float, loss_tokens: int
    ) -> None:
        self._policy, self._context, self._progress = policy, context, progress
        self._loss, self._loss_tokens = loss, loss_tokens
        self.spike = ""
        """Why the update was left out, in words; empty where it was taken."""

    def allow_update(self, norm: float) -> bool:
        """Whether the update is taken; the engine asks once it knows the gradient's norm. All ranks go by rank 0.

        Collective once there are enough steps to compare with.
        """
        recent = self._progress.recent
        if self._policy == "ignore" or len(recent) < MIN_SPIKE_STEPS:
            return True
        found = detect_spike(StepStats(self._loss, norm), self._loss_tokens, recent)
        [agreed] = self._context.all_reduce_sum(float(bool(found) and self._context.is_rank_zero))
        self.spike = (found or "rank 0 finds that it stands out") if agreed else ""
        return not agreed

    def handle_spike(self, saver: CheckpointManager, loss_sum: float, documents: str) -> None:
        """Say that the update was left out; `loss_sum` and `documents` are those of this rank. Collective.

        Raises TrainingError where that ends the run, which is then saved as it was before the update.
        """
        step = self._progress.step + 1
        _, highest = max(self._context.all_gather_object((loss_sum, documents)))
        what = f"step {step}: {self.spike} in the last {len(self._progress.recent)} steps"
        holds = f"The rank with the highest loss had: {highest}"
        before = count_consecutive_skips(self._progress.skips, self._progress.step)
        if self._policy == "skip" and before < MAX_CONSECUTIVE_SKIPS:
            if self._context.is_rank_zero:
                message = f"{what}; this update is left out. {holds}"
                self._context.report({"kind": "warning", "message": message})
            return
        saver.begin_save(self._progress)
        saved = f"a checkpoint of step {self._progress.step} is saved. {holds}"
        if self._policy == "skip":
            raise TrainingError(
                f"{what}, after {before} updates in a row that were left out: that is no spike any more; {saved}. "
                "failures.on_loss_spike=ignore takes the updates; an earlier checkpoint with a lower optim.lr "
                "(--accept "
                "optim.lr) may be what it needs"
            )
        raise TrainingError(
            f"{what}; stopped before this update, {saved}. "
            "failures.on_loss_spike=skip goes on without it, failures.on_loss_spike=ignore takes it"
        )
