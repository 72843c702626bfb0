"""`train.micro_batch: auto`: how many sequences a forward pass takes, from the memory of a device. Pure."""

from __future__ import annotations

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.batch import shares
from llm_training_toolkit.plan.plan import make_plan

_FILL = 0.9
"""Share of the free memory that the estimate may fill: it leaves out what allocators round up and kernels borrow."""


def settled(config: Config, micro_batch: int) -> Config:
    """The same run with a number where `auto` stood."""
    train = config.train.model_copy(update={"micro_batch": micro_batch})
    return config.model_copy(update={"train": train})


def fitting_micro_batch(config: Config, replicas: int, free_bytes: float) -> int:
    """The micro-batch with the fewest passes that the estimate fits into `free_bytes` of every device; at least 1.

    flash_attention_2 takes one: transformers tells packed documents apart in rows of one sequence only.
    """
    if config.model.attention == "flash_attention_2":
        return 1
    share = shares(config.train.global_batch, replicas)[0]
    fits = [rows for rows in _even(share) if _needed(config, replicas, rows) <= _FILL * free_bytes]
    return max(fits, default=1)


def smaller_micro_batch(config: Config, replicas: int, micro_batch: int) -> int:
    """The next one to try after `micro_batch` did not fit: at most half of it. 0 = there is none."""
    share = shares(config.train.global_batch, replicas)[0]
    return max((rows for rows in _even(share) if rows <= micro_batch // 2), default=0)


def _even(share: int) -> list[int]:
    """Micro-batches that divide a share into passes of nearly one size: 12 into 12, 6, 4, 3, 2 or 1."""
    return sorted({-(-share // passes) for passes in range(1, share + 1)})


def _needed(config: Config, replicas: int, micro_batch: int) -> float:
    """Bytes of a device at its peak, by the plan's estimate."""
    plan = make_plan(settled(config, micro_batch), replicas=replicas)
    return 1e9 * sum(plan.memory_gb_per_device.values())
