"""`train.precision: auto` and `engine.zero_stage: auto`: the values they take, with the reason. Pure.

measured on every worker -> choose_precision -> recorded in resolved.json, the run's from then on
precision, workers, memory -> lowest_zero_stage, sizing.fitting_zero_stage -> chosen anew by each attempt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.config.schema import Config

Precision = Literal["bf16", "fp32"]
PRECISION_KEY = "train.precision"
_SLOW = 1.2
"""Slowdown of bf16 from which a resume says so: below it the measurement's noise decides."""


@dataclass(frozen=True)
class ResolvedValue:
    """A field's value where `auto` stood, and the reason for it."""

    key: str
    value: str | int
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value} (auto): {self.reason}"


def choose_precision(slowdowns: Sequence[float], device_type: str) -> ResolvedValue:
    """Choose bf16 or fp32 for all workers from the slowest one's answer.

    `slowdowns` has one entry a worker: seconds of matrix products in bf16 / seconds in fp32. On GPUs it is 0 where the
    hardware computes in bf16 and infinite where it does not; nothing is measured there.
    """
    worst = max(slowdowns)
    if device_type != "cpu":
        has = math.isfinite(worst)
        reason = "the GPUs compute in bf16" if has else "not every GPU computes in bf16"
        return ResolvedValue(PRECISION_KEY, "bf16" if has else "fp32", reason)
    whose = "this CPU" if len(slowdowns) == 1 else "the slowest worker's CPU"
    precision = "bf16" if worst <= 1 else "fp32"
    return ResolvedValue(PRECISION_KEY, precision, f"bf16 is {_format_slowdown(worst)} than fp32 on {whose}")


def format_slow_precision(precision: str, slowdowns: Sequence[float]) -> str | None:
    """Words for a run that keeps bf16 on a CPU where fp32 is faster; None where there is nothing to say."""
    worst = max(slowdowns)
    if precision != "bf16" or worst < _SLOW or math.isinf(worst):
        return None
    return (
        f"this run is in bf16, which is {_format_slowdown(worst)} than fp32 on the CPU here; a run keeps its "
        "precision. "
        "With train.precision: auto a new one takes the faster"
    )


def _format_slowdown(slowdown: float) -> str:
    return f"{1 / slowdown:.2g} times faster" if slowdown < 1 else f"{slowdown:.2g} times slower"


def with_precision(config: Config, precision: Precision) -> Config:
    """Set the precision of a run."""
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def with_zero_stage(config: Config, stage: int) -> Config:
    """Set the ZeRO stage of a run."""
    engine = config.engine.model_copy(update={"zero_stage": stage})
    return config.model_copy(update={"engine": engine})


def with_assumed_values(config: Config) -> Config:
    """Assume bf16 and the stage for enough memory, as planned before a machine has decided."""
    if config.train.precision == "auto":
        config = with_precision(config, "bf16")
    return (
        with_zero_stage(config, get_candidate_zero_stages(config)[0]) if config.engine.zero_stage == "auto" else config
    )


def get_candidate_zero_stages(config: Config) -> tuple[int, ...]:
    """The ZeRO stages that `auto` chooses from, the cheapest first.

    Stage 0 reduces gradients once a step and gathers nothing. Stage 1 is left out: it takes longer than stage 2, and
    adds up micro-batches in bf16. Weights in 4 bits cannot be cut, so stage 3 is not for them.
    """
    lora = config.model.lora
    stages = (0, 2) if lora is not None and lora.quantize is not None else (0, 2, 3)
    # Settings of zero_optimization would do nothing at stage 0, which is the engine's own.
    return stages[1:] if config.engine.deepspeed.get("zero_optimization") else stages
