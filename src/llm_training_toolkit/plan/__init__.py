"""Plan of a run: steps, data mixture, memory, DeepSpeed configuration, problems. No torch."""

from __future__ import annotations

from llm_training_toolkit.plan.auto import (
    PRECISION_KEY,
    Precision,
    ResolvedValue,
    choose_attention,
    choose_precision,
    format_slow_precision,
    suggest_partitions,
    with_attention,
    with_precision,
    with_zero_stage,
)
from llm_training_toolkit.plan.batch import (
    compute_accumulation_steps,
    compute_loss_chunk_size,
    compute_replica_slice,
    split_global_batch,
)
from llm_training_toolkit.plan.compilation import choose_compilation, estimate_run_seconds, find_compile_problem
from llm_training_toolkit.plan.deepspeed import build_deepspeed_config, find_deepspeed_problems
from llm_training_toolkit.plan.forecast.cluster_estimate import (
    ClusterEstimate,
    estimate_on_cluster,
    resolve_for_hardware,
)
from llm_training_toolkit.plan.forecast.device_peaks import DevicePeak, find_device_peak
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware
from llm_training_toolkit.plan.forecast.step_time import MeasuredSpeed
from llm_training_toolkit.plan.horizon import DataFacts, Horizon, StreamFacts
from llm_training_toolkit.plan.lr_schedule import LRSchedule
from llm_training_toolkit.plan.memory.host_memory import (
    compute_checkpoint_copy_bytes,
    estimate_host_bytes,
    estimate_loading_bytes,
)
from llm_training_toolkit.plan.memory.memory_estimate import (
    CUDA_LIBRARY_BYTES,
    DeviceWorkload,
    MemoryEstimate,
    estimate_memory,
)
from llm_training_toolkit.plan.memory.memory_settings import (
    MemoryChoice,
    MemorySettings,
    choose_memory_settings,
    find_smaller_micro_batch,
    find_smaller_settings,
    with_micro_batch,
)
from llm_training_toolkit.plan.mixture import StreamPosition, compute_integer_shares, count_per_stream, merge_streams
from llm_training_toolkit.plan.plan import Plan, check_plan, make_plan, plan_workload
from llm_training_toolkit.plan.problem import Problem
from llm_training_toolkit.plan.text import format_mixture, format_plan

__all__ = [
    "CUDA_LIBRARY_BYTES",
    "PRECISION_KEY",
    "ClusterEstimate",
    "ClusterHardware",
    "DataFacts",
    "DevicePeak",
    "DeviceWorkload",
    "Horizon",
    "LRSchedule",
    "MeasuredSpeed",
    "MemoryChoice",
    "MemoryEstimate",
    "MemorySettings",
    "Plan",
    "Precision",
    "Problem",
    "ResolvedValue",
    "StreamFacts",
    "StreamPosition",
    "build_deepspeed_config",
    "check_plan",
    "choose_attention",
    "choose_compilation",
    "choose_memory_settings",
    "choose_precision",
    "compute_accumulation_steps",
    "compute_checkpoint_copy_bytes",
    "compute_integer_shares",
    "compute_loss_chunk_size",
    "compute_replica_slice",
    "count_per_stream",
    "estimate_host_bytes",
    "estimate_loading_bytes",
    "estimate_memory",
    "estimate_on_cluster",
    "estimate_run_seconds",
    "find_compile_problem",
    "find_deepspeed_problems",
    "find_device_peak",
    "find_smaller_micro_batch",
    "find_smaller_settings",
    "format_mixture",
    "format_plan",
    "format_slow_precision",
    "make_plan",
    "merge_streams",
    "plan_workload",
    "resolve_for_hardware",
    "split_global_batch",
    "suggest_partitions",
    "with_attention",
    "with_micro_batch",
    "with_precision",
    "with_zero_stage",
]
