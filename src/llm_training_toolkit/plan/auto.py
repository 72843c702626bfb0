"""Resolution of `train.precision` and `model.attn_implementation`: `auto`, with the reason. Pure.

measured on every worker -> choose_precision -> recorded in resolved.json, fixed for the run
precision, device -> choose_attention -> chosen again by each attempt
precision, attention, workers, memory -> choose_memory_settings (memory_settings.py) -> chosen again by each attempt
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.config.data_config import MAX_PARTITIONS
from llm_training_toolkit.config.schema import Config, Offload
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

Precision = Literal["bf16", "fp32"]
PRECISION_KEY = "train.precision"
GPU_ATTENTION = frozenset({"flash_attention_2", "flash_attention_3", "flex_attention"})
OFFLOAD_STAGES: dict[Offload, tuple[int, ...]] = {
    "none": (0, 1, 2, 3),
    "optimizer": (1, 3),
    "optimizer_and_weights": (3,),
}
"""ZeRO stages that can keep so much in host memory. Stage 0 has nothing apart from the weights to move; at stage 2
DeepSpeed 0.19.8 would sum micro-batches in bf16, and only if it knew their number."""
_PARTITION_BYTES = 1 << 31  # some 600 million tokens: minutes of preparation, and ten times what is shuffled at once
_SLOW = 1.2  # slowdown of bf16 from which a resume warns; below it, measurement noise decides


@dataclass(frozen=True)
class ResolvedValue:
    """Value chosen for a field set to `auto`, with the reason."""

    key: str
    value: str | int
    reason: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value} (auto): {self.reason}"


def choose_precision(slowdowns: Sequence[float], device_type: str) -> ResolvedValue:
    """Choose bf16 or fp32 for all workers, by the slowest worker.

    `slowdowns` has one entry per worker: seconds of matrix products in bf16 / seconds in fp32. On GPUs it is not
    measured: 0 with bf16 hardware, otherwise infinite.
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
    """Return a warning for a run that keeps bf16 on a CPU where fp32 is faster, or None."""
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


def suggest_partitions(config: Config, source_bytes: int) -> str | None:
    """Return a note that `data.partitions` would let a run over large files begin sooner; None where it would not help.

    `source_bytes` are those of the training sources' files as they are stored.
    """
    helps = config.train.epochs is None and all(each.group_by != "repository" for each in config.data.sources)
    if config.data.partitions is not None or source_bytes < 2 * _PARTITION_BYTES or not helps:
        return None
    count = min(source_bytes // _PARTITION_BYTES, MAX_PARTITIONS)
    return (
        f"{source_bytes / (1 << 30):,.1f} GiB of files are prepared before the first step. With data.partitions: "
        f"{count} a new run would begin with one part of them, and documents would mix within their part"
    )


def with_precision(config: Config, precision: Precision) -> Config:
    """Return the configuration with this precision."""
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train})


def choose_attention(
    precision: str,
    head_dim: int,
    device_type: str,
    *,
    has_flash: bool,
    deterministic: bool,
    sequence_parallel: int = 1,
) -> ResolvedValue:
    """Choose the implementation of attention; `has_flash` = the GPU has torch's flash kernels.

    Head sizes are those of FlashAttention-2 (Dao 2023): multiples of 8 up to 256. Measured on CPU (docs/objective.md),
    documents one by one are no faster than a mask in rows of 256 tokens. Raises PlanError if `sequence_parallel` ranks
    share a row on GPUs without variable-length attention.
    """
    key = "model.attn_implementation"
    if device_type == "cpu" and sequence_parallel > 1:
        return ResolvedValue(key, "varlen", "engine.sequence_parallel exchanges the tokens of whole documents")
    if device_type == "cpu":
        return ResolvedValue(key, "sdpa", "on CPUs one masked product is no slower than one for each document")
    reasons = {
        "flash kernels compute in bf16, and this run is in fp32": precision != "bf16",
        f"flash kernels have no heads of size {head_dim}": head_dim % 8 != 0 or head_dim > 256,
        "the GPU has no flash kernels (before compute capability 8.0)": not has_flash,
        "run.deterministic: variable-length attention is not known to repeat every bit": deterministic,
    }
    against = next((reason for reason, holds in reasons.items() if holds), None)
    if against is not None and sequence_parallel > 1:
        raise PlanError(
            f"engine.sequence_parallel = {sequence_parallel} needs variable-length attention, and {against}"
        )
    if against is not None:
        return ResolvedValue(key, "sdpa", against)
    return ResolvedValue(key, "varlen", "it computes each document by itself, without a mask")


def with_attention(config: Config, implementation: str) -> Config:
    """Return the configuration with this implementation of attention."""
    model = config.model.model_copy(update={"attn_implementation": implementation})
    return config.model_copy(update={"model": model})


def with_activation_checkpointing(config: Config, kind: ActivationCheckpointing | Literal["auto"]) -> Config:
    """Return the configuration with this kind of activation checkpointing."""
    model = config.model.model_copy(update={"activation_checkpointing": kind})
    return config.model_copy(update={"model": model})


def with_zero_stage(config: Config, stage: int) -> Config:
    """Return the configuration with this ZeRO stage."""
    engine = config.engine.model_copy(update={"zero_stage": stage})
    return config.model_copy(update={"engine": engine})


def with_assumed_values(config: Config) -> Config:
    """Replace `auto` by what is planned before the hardware is known.

    These are bf16, varlen on GPUs, no recomputation and the cheapest ZeRO stage; the micro-batch stays open.
    """
    if config.train.precision == "auto":
        config = with_precision(config, "bf16")
    if config.model.attn_implementation == "auto":
        on_gpu = config.cluster.gpus_per_worker != 0 and config.train.precision == "bf16"
        config = with_attention(config, "varlen" if on_gpu or config.engine.sequence_parallel > 1 else "sdpa")
    if config.model.activation_checkpointing == "auto":
        config = with_activation_checkpointing(config, "none")
    if config.engine.zero_stage == "auto":
        config = with_zero_stage(config, get_candidate_zero_stages(config)[0])
    return config


def get_candidate_zero_stages(config: Config) -> tuple[int, ...]:
    """Return the ZeRO stages that `auto` chooses from, cheapest first.

    Stages 0 and 1 reduce gradients once per step, 2 and 3 with every micro-batch; stage 3 gathers all weights for every
    pass. It is left out for 4-bit weights, which cannot be sharded, and for compiled layers, which its hooks would cut.
    """
    lora = config.model.lora
    possible = OFFLOAD_STAGES[config.engine.offload]
    if config.engine.tensor_parallel > 1:  # of DeepSpeed's stages, which sum over all ranks, none
        return tuple(stage for stage in possible if stage <= 1) or (1,)
    if config.engine.zero_hpz_partition_size > 1:
        return (3,)
    if config.model.compile is True or (lora is not None and lora.quantize is not None):
        possible = tuple(stage for stage in possible if stage < 3)
    # Stages 0 and 1 are the engine's own, and would ignore settings of zero_optimization.
    if config.engine.deepspeed.get("zero_optimization"):
        possible = tuple(stage for stage in possible if stage >= 2)
    return possible or OFFLOAD_STAGES[config.engine.offload][-1:]
