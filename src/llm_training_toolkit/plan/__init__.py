"""From a configuration to what will happen: steps, shares, memory, DeepSpeed's configuration, problems. No torch."""

from __future__ import annotations

from llm_training_toolkit.plan.batch import accumulation, loss_chunk_tokens, shares, slice_of
from llm_training_toolkit.plan.deepspeed import deepspeed_config, deepspeed_problems
from llm_training_toolkit.plan.memory import Load, Memory, estimate
from llm_training_toolkit.plan.plan import DataFacts, Plan, make_plan, require
from llm_training_toolkit.plan.problem import Problem
from llm_training_toolkit.plan.schedule import Schedule
from llm_training_toolkit.plan.show import lines
from llm_training_toolkit.plan.sizing import fitting_micro_batch, settled, smaller_micro_batch

__all__ = [
    "DataFacts",
    "Load",
    "Memory",
    "Plan",
    "Problem",
    "Schedule",
    "accumulation",
    "deepspeed_config",
    "deepspeed_problems",
    "estimate",
    "fitting_micro_batch",
    "lines",
    "loss_chunk_tokens",
    "make_plan",
    "require",
    "settled",
    "shares",
    "slice_of",
    "smaller_micro_batch",
]
