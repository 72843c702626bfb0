"""Resolution of `train.micro_batch_size: auto` and `engine.zero_stage: auto` by device memory. Pure."""

from __future__ import annotations

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.auto import ResolvedValue, get_candidate_zero_stages, with_zero_stage
from llm_training_toolkit.plan.batch import get_micro_batch, split_global_batch
from llm_training_toolkit.plan.plan import make_plan

# Share of free memory for the estimate: 5 % for its error, the rest for what allocators round up and split.
MEMORY_FILL = 0.9


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    """Return the configuration with this micro-batch instead of `auto`."""
    train = config.train.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"train": train})


def find_fitting_micro_batch(config: Config, replicas: int, free_bytes: float) -> int:
    """Return the micro-batch with the fewest passes whose estimate fits into `free_bytes` of a device; at least 1."""
    share = split_global_batch(config.train.global_batch_size, replicas)[0]
    fits = [
        rows
        for rows in _list_even_micro_batches(share)
        if _estimate_bytes(config, replicas, rows) <= MEMORY_FILL * free_bytes
    ]
    return max(fits, default=1)


def find_smaller_micro_batch(config: Config, replicas: int, micro_batch: int) -> int:
    """Return the next micro-batch to try after an OOM: at most half of `micro_batch`; 0 if there is none."""
    share = split_global_batch(config.train.global_batch_size, replicas)[0]
    return max((rows for rows in _list_even_micro_batches(share) if rows <= micro_batch // 2), default=0)


def find_fitting_zero_stage(config: Config, replicas: int, free_bytes: float) -> ResolvedValue:
    """Return the cheapest ZeRO stage whose estimate fits into `free_bytes` of every device, else the highest.

    For one worker it is the first: with nothing to shard, higher stages save no memory.
    """
    stages = get_candidate_zero_stages(config)
    if replicas == 1:
        return ResolvedValue("engine.zero_stage", stages[0], "it costs least for one worker")
    needed = {stage: _estimate_bytes_at_stage(config, replicas, stage) for stage in stages}
    stage = next((stage for stage in stages if needed[stage] <= MEMORY_FILL * free_bytes), stages[-1])
    fits = (
        "the lowest stage that fits" if needed[stage] <= MEMORY_FILL * free_bytes else "the stage with the least memory"
    )
    why = f"{fits}, {needed[stage] / 1e9:.3g} GB of the {free_bytes / 1e9:.3g} GB a worker has free"
    return ResolvedValue("engine.zero_stage", stage, why)


def _estimate_bytes_at_stage(config: Config, replicas: int, stage: int) -> float:
    """Return the bytes per device at a ZeRO stage; an `auto` micro-batch counts as 1."""
    return _estimate_bytes(with_zero_stage(config, stage), replicas, get_micro_batch(config))


def find_higher_zero_stage(config: Config, replicas: int) -> int | None:
    """Return the stage to try after an OOM at the smallest micro-batch, or None for one worker and at the highest."""
    higher = [stage for stage in get_candidate_zero_stages(config) if stage > int(config.engine.zero_stage)]
    return min(higher) if replicas > 1 and higher else None


def _list_even_micro_batches(share: int) -> list[int]:
    """Return the micro-batches that split a share into passes of nearly one size: 12 into 12, 6, 4, 3, 2 or 1."""
    return sorted({-(-share // passes) for passes in range(1, share + 1)})


def _estimate_bytes(config: Config, replicas: int, micro_batch: int) -> float:
    """Return the peak bytes per device, by the plan's estimate."""
    plan = make_plan(with_micro_batch(config, micro_batch), replicas=replicas)
    return 1e9 * sum(plan.memory_gb_per_device.values())
