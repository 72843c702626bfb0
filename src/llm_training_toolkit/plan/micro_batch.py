"""`train.micro_batch_size: auto` and `engine.zero_stage: auto`: what fits into the memory of a device. Pure."""

from __future__ import annotations

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.auto import ResolvedValue, get_candidate_zero_stages, with_zero_stage
from llm_training_toolkit.plan.batch import get_micro_batch, split_global_batch
from llm_training_toolkit.plan.plan import make_plan

_FILL = 0.9
"""Share of the free memory that the estimate may fill: it leaves out what allocators round up and kernels borrow."""


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    """The same run with a number where `auto` stood."""
    train = config.train.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"train": train})


def find_fitting_micro_batch(config: Config, replicas: int, free_bytes: float) -> int:
    """The micro-batch with the fewest passes that the estimate fits into `free_bytes` of every device; at least 1.

    flash_attention_2 takes one: transformers tells packed documents apart in rows of one sequence only.
    """
    if config.model.attn_implementation == "flash_attention_2":
        return 1
    share = split_global_batch(config.train.global_batch_size, replicas)[0]
    fits = [
        rows
        for rows in _list_even_micro_batches(share)
        if _estimate_bytes(config, replicas, rows) <= _FILL * free_bytes
    ]
    return max(fits, default=1)


def find_smaller_micro_batch(config: Config, replicas: int, micro_batch: int) -> int:
    """The next one to try after `micro_batch` did not fit: at most half of it. 0 = there is none."""
    share = split_global_batch(config.train.global_batch_size, replicas)[0]
    return max((rows for rows in _list_even_micro_batches(share) if rows <= micro_batch // 2), default=0)


def find_fitting_zero_stage(config: Config, replicas: int, free_bytes: float) -> ResolvedValue:
    """The cheapest ZeRO stage whose estimate fits into `free_bytes` of every device; the highest where none does.

    One worker has nothing to spread, so that no stage above the first saves memory there.
    """
    stages = get_candidate_zero_stages(config)
    if replicas == 1:
        return ResolvedValue("engine.zero_stage", stages[0], "it costs least for one worker")
    needed = {stage: _estimate_bytes_at_stage(config, replicas, stage) for stage in stages}
    stage = next((stage for stage in stages if needed[stage] <= _FILL * free_bytes), stages[-1])
    fits = "the lowest stage that fits" if needed[stage] <= _FILL * free_bytes else "the stage with the least memory"
    why = f"{fits}, {needed[stage] / 1e9:.3g} GB of the {free_bytes / 1e9:.3g} GB a worker has free"
    return ResolvedValue("engine.zero_stage", stage, why)


def _estimate_bytes_at_stage(config: Config, replicas: int, stage: int) -> float:
    """Bytes of a device at a ZeRO stage; with micro-batches of one where they are `auto`."""
    return _estimate_bytes(with_zero_stage(config, stage), replicas, get_micro_batch(config))


def find_higher_zero_stage(config: Config, replicas: int) -> int | None:
    """The stage to try after memory ran out with the smallest micro-batch; None for one worker, or at the highest."""
    higher = [stage for stage in get_candidate_zero_stages(config) if stage > int(config.engine.zero_stage)]
    return min(higher) if replicas > 1 and higher else None


def _list_even_micro_batches(share: int) -> list[int]:
    """Micro-batches that divide a share into passes of nearly one size: 12 into 12, 6, 4, 3, 2 or 1."""
    return sorted({-(-share // passes) for passes in range(1, share + 1)})


def _estimate_bytes(config: Config, replicas: int, micro_batch: int) -> float:
    """Bytes of a device at its peak, by the plan's estimate."""
    plan = make_plan(with_micro_batch(config, micro_batch), replicas=replicas)
    return 1e9 * sum(plan.memory_gb_per_device.values())
