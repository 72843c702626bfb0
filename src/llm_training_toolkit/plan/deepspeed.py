"""The DeepSpeed configuration of a run, and what of `engine.deepspeed` cannot be part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.batch import get_micro_batch
from llm_training_toolkit.plan.problem import Problem

_NEVER = 2**31 - 1
_BUCKET = 500_000_000
"""DeepSpeed's own default, in elements."""

_BATCH = "The toolkit divides the batch itself: set train.global_batch_size and train.micro_batch_size"
_PRECISION = "Set train.precision"
_SUM = "Remove it: the loss is one sum over the global batch, which this would rescale"
OWNED_KEYS: dict[str, str] = {
    "train_batch_size": _BATCH,
    "train_micro_batch_size_per_gpu": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "managed_gradient_accumulation": "Remove it: the toolkit marks the end of a step itself",
    "optimizer": "Set optim: the toolkit brings the optimizer",
    "scheduler": "Set optim.lr_scheduler: a scheduler here would silently win over it",
    "gradient_clipping": "Set optim.max_grad_norm",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": f"{_PRECISION}; fp16 is not supported, use bf16",
    "torch_autocast": _PRECISION,
    "data_types": "Remove it: gradients accumulate in fp32 wherever the stage can",
    "communication_data_type": "Remove it: gradients are reduced in fp32",
    "prescale_gradients": _SUM,
    "gradient_predivide_factor": _SUM,
    "gradient_allreduce_op": _SUM,
    "zero_allow_untested_optimizer": "Remove it: it is always on",
    "zero_force_ds_cpu_optimizer": "Remove it: the optimizer is torch's",
    "checkpoint": "Set checkpoint: the toolkit writes its own files",
    "dataloader_drop_last": "Remove it: the toolkit brings the batches, and drops none",
    "data_efficiency": "Remove it: the order of the data is the toolkit's",
    "tensor_parallel": "Remove it: not supported yet",
    "sequence_parallel_size": "Remove it: not supported yet",
    "expert_parallel": "Remove it: not supported",
    "pipeline": "Remove it: not supported",
    "zero_optimization.stage": "Set engine.zero_stage",
    "zero_optimization.offload_optimizer": "Remove it: offloading is not supported yet",
    "zero_optimization.offload_param": "Remove it: offloading is not supported yet",
    "zero_optimization.elastic_checkpoint": "Remove it: any checkpoint loads at any number of workers",
    "zero_optimization.load_from_fp32_weights": "Remove it: the toolkit loads weights itself",
}
"""Keys the toolkit sets, with what to do instead."""

REMOVED_KEYS: tuple[str, ...] = (
    "amp",
    "compression_training",
    "curriculum_learning",
    "eigenvalue",
    "elasticity",
    "graph_harvesting",
    "nebula",
    "progressive_layer_drop",
    "quantize_training",
    "sparse_attention",
    "sparse_gradients",
    "zero_optimization.mics_hierarchical_params_gather",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zeropp_loco_param",
)
"""Keys that DeepSpeed 0.19 refuses (deepspeed/runtime/config.py, `_REMOVED_TOP_LEVEL_CONFIG_KEYS`)."""


def build_deepspeed_config(config: Config, *, parameters: int = _BUCKET) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`, `engine.deepspeed` merged in as it stands.

    `deepspeed_problems` says what must not be in there. `parameters` is the size of the model, as in `own_config`.
    """
    return merge_nested(build_base_config(config, parameters=parameters), config.engine.deepspeed)


def build_base_config(config: Config, *, parameters: int = _BUCKET) -> dict[str, Any]:
    """What the toolkit itself asks of DeepSpeed; independent of the number of workers.

    One call of `step` is one optimizer step (accumulation 1 here): the loop marks the boundary itself, so the batch
    arithmetic never reaches DeepSpeed. `parameters` bounds the buckets, which would otherwise take a gigabyte beside a
    model of a few megabytes.
    """
    return {
        "train_micro_batch_size_per_gpu": get_micro_batch(config),
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default became 1.0; written out, 0 means none. At stage 0 the engine clips (engine/replica.py).
        "gradient_clipping": config.optim.max_grad_norm if int(config.engine.zero_stage) else 0.0,
        "zero_optimization": _build_zero_block(int(config.engine.zero_stage), min(parameters, _BUCKET)),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "steps_per_print": _NEVER,
        **_build_precision_blocks(config),
    }


def _build_zero_block(stage: int, bucket: int) -> dict[str, Any]:
    # overlap_comm: a second bucket, on by default at stage 3 only; off everywhere gives one order of reduction.
    return {
        "stage": stage,
        "overlap_comm": False,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }


def _build_precision_blocks(config: Config) -> dict[str, Any]:
    """Blocks of the precision; fp32 is the absence of all. At stage 0 the engine keeps the fp32 weights itself."""
    if config.train.precision == "fp32" or config.engine.zero_stage == 0:
        return {}
    # With the check DeepSpeed leaves such an update out instead of writing NaN into the weights; the engine
    # asks whether it was left out, and the loop stops and says so.
    blocks: dict[str, Any] = {"bf16": {"enabled": True, "check_grad_overflow": True}}
    if int(config.engine.zero_stage) >= 2:
        # Stage 1 would switch to another optimizer class.
        blocks["data_types"] = {"grad_accum_dtype": "fp32"}
    return blocks


def merge_nested(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, block by block."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merge_nested(below, value) if both else value  # type: ignore[arg-type]  # `both` says it is a mapping
    return result


def find_deepspeed_problems(given: Mapping[str, Any]) -> tuple[Problem, ...]:
    """What of `engine.deepspeed` the toolkit owns or DeepSpeed no longer has; empty when it can be merged."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return (Problem("engine.deepspeed.zero_optimization", f"{zero!r} is not a block of keys", "Write a mapping"),)
    keys = [*given, *(f"zero_optimization.{key}" for key in zero)]
    owned = (
        Problem(f"engine.deepspeed.{key}", "the toolkit owns this key", OWNED_KEYS[key])
        for key in keys
        if key in OWNED_KEYS
    )
    gone = (
        Problem(f"engine.deepspeed.{key}", "DeepSpeed 0.19 has removed this and refuses it", "Remove the key")
        for key in keys
        if key in REMOVED_KEYS
    )
    return (*owned, *gone)
