"""Joint resolution of activation checkpointing, micro-batch and ZeRO stage by device memory, where they are `auto`.

The fastest combination whose estimate fits is taken. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.auto import (
    ResolvedValue,
    get_candidate_zero_stages,
    with_activation_checkpointing,
    with_zero_stage,
)
from llm_training_toolkit.plan.batch import count_replicas, split_global_batch
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.plan.memory.memory_estimate import DeviceWorkload, estimate_memory
from llm_training_toolkit.plan.plan import plan_workload

# Share of free memory for the estimate: 5 % for its error, the rest for what allocators round up and split.
MEMORY_FILL = 0.9
# Tokens of a pass that keep a GPU busy: below it kernels of models of some billion weights are short. An assumption.
_BUSY_TOKENS = 4096
CHECKPOINTING_KEY = "model.activation_checkpointing"
_CHECKPOINTING_BY_WORK: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class MemorySettings:
    """Settings that trade speed for memory and leave the result as it is."""

    checkpointing: ActivationCheckpointing
    micro_batch: int
    zero: int

    def apply_to_config(self, config: Config) -> Config:
        """Return the configuration with these settings."""
        config = with_activation_checkpointing(config, self.checkpointing)
        return with_micro_batch(with_zero_stage(config, self.zero), self.micro_batch)

    def estimate_bytes(self, load: DeviceWorkload) -> int:
        """Return the peak bytes per device of a workload with these settings instead of its own."""
        return estimate_memory(
            replace(load, checkpointing=self.checkpointing, micro_batch=self.micro_batch, zero=self.zero)
        ).total


@dataclass(frozen=True)
class MemoryChoice:
    """Chosen settings, with the reason for each that was `auto`."""

    settings: MemorySettings
    reasons: tuple[ResolvedValue, ...]


def with_micro_batch(config: Config, micro_batch: int | Literal["auto"]) -> Config:
    """Return the configuration with this micro-batch."""
    train = config.train.model_copy(update={"micro_batch_size": micro_batch})
    return config.model_copy(update={"train": train})


def choose_memory_settings(config: Config, ranks: int, free_bytes: float) -> MemoryChoice:
    """Choose the fastest settings whose estimate fits into `free_bytes` of every device, else those with the least."""
    load = plan_workload(config, ranks)
    needed = {settings: settings.estimate_bytes(load) for settings in list_memory_settings(config, ranks)}
    fitting = (settings for settings, size in needed.items() if size <= MEMORY_FILL * free_bytes)
    chosen = next(fitting, min(needed, key=lambda settings: needed[settings]))
    return MemoryChoice(chosen, tuple(_iter_reasons(config, ranks, free_bytes, needed, chosen)))


def list_memory_settings(config: Config, ranks: int) -> list[MemorySettings]:
    """Return all combinations of the settings that are `auto`, the fastest first.

    Recomputation costs the most, then stages 2 and 3, which exchange gradients with every pass, then passes too short
    to keep a device busy. Among the others a lower stage comes first, and then the larger micro-batch.
    """
    kind, rows, stage = (
        config.model.activation_checkpointing,
        config.train.micro_batch_size,
        config.engine.zero_stage,
    )
    share = _get_largest_share(config, ranks)
    combinations = [
        MemorySettings(each_kind, each_rows, each_stage)
        for each_kind in (_CHECKPOINTING_BY_WORK if kind == "auto" else (kind,))
        for each_rows in (_list_even_micro_batches(share)[::-1] if rows == "auto" else (rows,))
        for each_stage in (_list_zero_stages(config, ranks) if stage == "auto" else (stage,))
    ]

    def rank_by_speed(settings: MemorySettings) -> tuple[int, bool, int, int, int]:
        work = _CHECKPOINTING_BY_WORK.index(settings.checkpointing)
        tokens = settings.micro_batch * config.data.sequence_length // config.engine.sequence_parallel
        filled = min(tokens, _BUSY_TOKENS)
        return work, settings.zero >= 2, -filled, settings.zero, -settings.micro_batch

    return sorted(combinations, key=rank_by_speed)


def find_smaller_settings(config: Config, tried: MemorySettings, ranks: int) -> MemorySettings | None:
    """Return the settings to try after `tried` ran out of memory, changing only `auto` ones, or None.

    The micro-batch is halved as long as that is possible, then the ZeRO stage is raised, then more is recomputed. Each
    is taken only if it needs less memory by the estimate: in a small model the buffers of stage 3 can outweigh their
    gain.
    """
    if config.train.micro_batch_size == "auto":
        rows = find_smaller_micro_batch(config, ranks, tried.micro_batch)
        if rows:
            return replace(tried, micro_batch=rows)
    following: list[MemorySettings] = []
    if config.engine.zero_stage == "auto":
        higher = (stage for stage in _list_zero_stages(config, ranks) if stage > tried.zero)
        following += [replace(tried, zero=stage) for stage in higher]
    if config.model.activation_checkpointing == "auto":
        more = _CHECKPOINTING_BY_WORK[_CHECKPOINTING_BY_WORK.index(tried.checkpointing) + 1 :]
        following += [replace(tried, checkpointing=kind) for kind in more]
    load = plan_workload(config, ranks)
    needed = tried.estimate_bytes(load)
    return next((settings for settings in following if settings.estimate_bytes(load) < needed), None)


def find_smaller_micro_batch(config: Config, ranks: int, micro_batch: int) -> int:
    """Return the next micro-batch to try after an OOM: at most half of `micro_batch`; 0 if there is none."""
    share = _get_largest_share(config, ranks)
    return max((rows for rows in _list_even_micro_batches(share) if rows <= micro_batch // 2), default=0)


def _get_largest_share(config: Config, ranks: int) -> int:
    """Return the sequences of the replica with the most."""
    replicas = count_replicas(ranks, config.engine.ranks_per_replica)
    return split_global_batch(config.train.global_batch_size, replicas)[0]


def _list_zero_stages(config: Config, ranks: int) -> tuple[int, ...]:
    """Return the stages of `auto`; for one worker only the first, because higher ones have nothing to shard.

    So it is for one replica of workers that hold slices of the same matrices.
    """
    stages = get_candidate_zero_stages(config)
    return stages[:1] if ranks == config.engine.tensor_parallel else stages


def _list_even_micro_batches(share: int) -> list[int]:
    """Return the micro-batches that split a share into passes of nearly one size: 12 into 12, 6, 4, 3, 2 or 1."""
    return sorted({-(-share // passes) for passes in range(1, share + 1)})


def _iter_reasons(
    config: Config, ranks: int, free_bytes: float, needed: Mapping[MemorySettings, int], chosen: MemorySettings
) -> Iterator[ResolvedValue]:
    """Yield the reason for each setting that was `auto`."""
    fits = needed[chosen] <= MEMORY_FILL * free_bytes
    there = f"{needed[chosen] / 1e9:.3g} GB of the {free_bytes / 1e9:.3g} GB a worker has free"
    if config.model.activation_checkpointing == "auto":
        reason = (
            _format_checkpointing_reason(needed, chosen, there, free_bytes) if fits else f"the least memory, {there}"
        )
        yield ResolvedValue(CHECKPOINTING_KEY, chosen.checkpointing, reason)
    if config.engine.zero_stage == "auto":
        which = "of the fastest settings that fit" if fits else "the stage with the least memory"
        reason = "it costs least for one worker" if ranks == 1 else f"{which}, {there}"
        yield ResolvedValue("engine.zero_stage", chosen.zero, reason)
    if config.train.micro_batch_size == "auto":
        yield ResolvedValue(
            "train.micro_batch_size", chosen.micro_batch, f"{'fits' if fits else 'the smallest'}, {there}"
        )


def _format_checkpointing_reason(
    needed: Mapping[MemorySettings, int], chosen: MemorySettings, there: str, free_bytes: float
) -> str:
    """Say what less recomputation would need at least."""
    if chosen.checkpointing == "none":
        return f"nothing has to be recomputed, {there}"
    less = _CHECKPOINTING_BY_WORK[: _CHECKPOINTING_BY_WORK.index(chosen.checkpointing)]
    least = {kind: min(size for each, size in needed.items() if each.checkpointing == kind) for kind in less}
    needs = " and ".join(f"{kind} needs {size / 1e9:.3g} GB" for kind, size in least.items())
    return f"{needs}, and a plan fills {MEMORY_FILL * free_bytes / 1e9:.3g} of {free_bytes / 1e9:.3g} GB"
