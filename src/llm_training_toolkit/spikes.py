"""Whether a step's loss or gradient stands out from the steps before it. Pure.

A step is compared with the median of the last steps, in units of their median absolute deviation: unlike mean and
standard deviation, both stay where they are when a few of those steps were spikes themselves.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 128
"""Steps that are looked back on. This and 6 deviations are what OLMo 2 was trained with (SkipStepAdamW in OLMo-core:
rolling_interval_length 128, sigma_factor 6, there of mean and standard deviation; half a window before it begins)."""
FEWEST = WINDOW // 2
"""Steps to have seen before any is judged: the first ones fall too fast to say what is usual."""
_DEVIATIONS = 6.0
_NORMAL = 1.4826
"""Median absolute deviation to standard deviation, where values are normally distributed."""
_LOSS_FLOOR = 0.02
"""Of the median: the least deviation of losses, so that a run whose losses hardly vary is not stopped below +12 %."""
_TOKEN_FLOOR = 8.0
"""Nats: the least deviation of losses is this over the root of the step's loss tokens. One token's loss varies by 2 or
3 nats, and neighbours vary together. A healthy run of 256 tokens a step went from 0.96 to 2.97 and back, 4.0 of these
deviations; from 65,536 tokens a step on they are below 2 % of a loss of 1.6."""
_NORM_FLOOR = math.log(10.0) / _DEVIATIONS
"""The least deviation of the logarithm of gradient norms. They are skewed, and clipping takes care of the common
outliers: less than ten times the usual one is none."""
MOST_IN_A_ROW = 10
"""Updates that may be left out one after another: beyond that it is no spike but how the run stands."""


class Taken(NamedTuple):
    """A step's numbers, as later ones are compared with them."""

    loss: float
    norm: float
    """The gradient's, before clipping."""


class Skip(NamedTuple):
    """An update that was left out."""

    step: int
    """Counted from 1."""
    first: int
    """The first of the step's sequences, counted along the lineage."""
    sequences: int


def remembered(recent: Sequence[Taken], step: Taken) -> tuple[Taken, ...]:
    """The steps to compare the next one with. Spikes are among them: where all steps are higher, that is usual."""
    return (*recent[-(WINDOW - 1) :], step)


def spike(step: Taken, loss_tokens: int, recent: Sequence[Taken]) -> str:
    """How a step stands out from those before it, in words; empty where it does not, or too few are known.

    loss_tokens: of which the step's loss is the mean.
    """
    if len(recent) < FEWEST:
        return ""
    chance = _TOKEN_FLOOR / math.sqrt(max(loss_tokens, 1))
    losses = [each.loss for each in recent]
    deviations, usual = _deviations(step.loss, losses, floor=chance, relative_floor=_LOSS_FLOOR)
    if deviations > _DEVIATIONS:
        return f"the loss is {step.loss:.4g}, {deviations:.0f} deviations above its median of {usual:.4g}"
    logs = [_log(each.norm) for each in recent]
    deviations, usual = _deviations(_log(step.norm), logs, floor=_NORM_FLOOR)
    if deviations > _DEVIATIONS:
        times = math.exp(_log(step.norm) - usual)
        return f"the gradient's norm is {step.norm:.4g}, {times:.0f} times its median of {math.exp(usual):.4g}"
    return ""


def row_of_skips(skips: Sequence[Skip], step: int) -> int:
    """How many updates in a row were left out, the last of them that of `step`."""
    left_out = {skip.step for skip in skips}
    length = 0
    while step - length in left_out:
        length += 1
    return length


def _deviations(
    value: float, recent: Sequence[float], *, floor: float = 0.0, relative_floor: float = 0.0
) -> tuple[float, float]:
    """How many deviations a value lies above the median of others, and that median."""
    usual = statistics.median(recent)
    spread = _NORMAL * statistics.median(abs(each - usual) for each in recent)
    least = max(floor, relative_floor * abs(usual))
    return (value - usual) / max(spread, least, 1e-12), usual


def _log(norm: float) -> float:
    """The logarithm of a norm; of zero, where a step has nothing to learn, that of the smallest number there is."""
    return math.log(max(norm, 1e-300))
