"""From a configuration to what will happen: steps, shares, memory, DeepSpeed's configuration, problems. No torch."""

from __future__ import annotations

from llm_training_toolkit.plan.auto import (
    PRECISION,
    Precision,
    Resolved,
    choose_precision,
    slow_precision,
    with_precision,
    with_zero_stage,
)
from llm_training_toolkit.plan.batch import accumulation, loss_chunk_tokens, shares, slice_of
from llm_training_toolkit.plan.deepspeed import deepspeed_config, deepspeed_problems
from llm_training_toolkit.plan.estimate import Forecast, on_cluster, resolved_on
from llm_training_toolkit.plan.hardware import Hardware
from llm_training_toolkit.plan.lr_schedule import Schedule
from llm_training_toolkit.plan.memory import Load, Memory, checkpoint_copy, estimate
from llm_training_toolkit.plan.micro_batch import (
    fitting_micro_batch,
    fitting_zero_stage,
    higher_zero_stage,
    settled,
    smaller_micro_batch,
)
from llm_training_toolkit.plan.mixture import Due, counts, merged, whole_shares
from llm_training_toolkit.plan.plan import DataFacts, Plan, StreamFacts, make_plan, require
from llm_training_toolkit.plan.problem import Problem
from llm_training_toolkit.plan.text import lines, mixture_lines

__all__ = [
    "PRECISION",
    "DataFacts",
    "Due",
    "Forecast",
    "Hardware",
    "Load",
    "Memory",
    "Plan",
    "Precision",
    "Problem",
    "Resolved",
    "Schedule",
    "StreamFacts",
    "accumulation",
    "checkpoint_copy",
    "choose_precision",
    "counts",
    "deepspeed_config",
    "deepspeed_problems",
    "estimate",
    "fitting_micro_batch",
    "fitting_zero_stage",
    "higher_zero_stage",
    "lines",
    "loss_chunk_tokens",
    "make_plan",
    "merged",
    "mixture_lines",
    "on_cluster",
    "require",
    "resolved_on",
    "settled",
    "shares",
    "slice_of",
    "slow_precision",
    "smaller_micro_batch",
    "whole_shares",
    "with_precision",
    "with_zero_stage",
]
