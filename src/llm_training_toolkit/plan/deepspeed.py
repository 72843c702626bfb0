"""DeepSpeed configuration of a run, and problems of `engine.deepspeed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_training_toolkit.config.schema import Config, EngineConfig
from llm_training_toolkit.plan.batch import get_micro_batch
from llm_training_toolkit.plan.problem import Problem

_NEVER = 2**31 - 1
_BUCKET = 500_000_000  # DeepSpeed's own default, in elements
# Gradients that are reduced at once. In fp32 they are 0.4 GB, a millisecond or more on any link and so long beside the
# start of a collective; DeepSpeed's default has up to 4 GB more in flight. transformers' `auto` is 13 million for 7B.
_REDUCE_BUCKET = 100_000_000

_BATCH = "The toolkit divides the batch itself: set train.global_batch_size and train.micro_batch_size"
_PRECISION = "Set train.precision"
_SUM = "Remove it: the loss is one sum over the global batch, which this would rescale"
# Keys that the toolkit sets, each with the fix shown to users.
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
    "communication_data_type": "Set engine.communication_data_type",
    "prescale_gradients": _SUM,
    "gradient_predivide_factor": _SUM,
    "gradient_allreduce_op": _SUM,
    "zero_allow_untested_optimizer": "Remove it: it is always on",
    "zero_force_ds_cpu_optimizer": "Remove it: the optimizer is torch's",
    "checkpoint": "Set checkpoint: the toolkit writes its own files",
    "dataloader_drop_last": "Remove it: the toolkit brings the batches, and drops none",
    "data_efficiency": "Remove it: the order of the data is the toolkit's",
    "tensor_parallel": "Set engine.tensor_parallel: the toolkit cuts the matrices itself",
    "sequence_parallel_size": "Set engine.sequence_parallel: the toolkit exchanges tokens and heads itself",
    "expert_parallel": "Remove it: not supported",
    "pipeline": "Remove it: not supported",
    "zero_optimization.stage": "Set engine.zero_stage",
    "zero_optimization.offload_optimizer": "Set engine.offload: optimizer",
    "zero_optimization.offload_param": "Set engine.offload: optimizer_and_weights",
    "zero_optimization.zero_hpz_partition_size": "Set engine.zero_hpz_partition_size",
    "zero_optimization.elastic_checkpoint": "Remove it: any checkpoint loads at any number of workers",
    "zero_optimization.load_from_fp32_weights": "Remove it: the toolkit loads weights itself",
}

# Keys that DeepSpeed 0.19 refuses (deepspeed/runtime/config.py, `_REMOVED_TOP_LEVEL_CONFIG_KEYS`).
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


def build_deepspeed_config(config: Config, *, parameters: int = _BUCKET, workers: int = 1) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`, with `engine.deepspeed` merged in unchanged.

    `find_deepspeed_problems` reports keys that must not be in there. `parameters` is the model size, as in
    `build_base_config`.
    """
    return merge_nested(build_base_config(config, parameters=parameters, workers=workers), config.engine.deepspeed)


def build_base_config(config: Config, *, parameters: int = _BUCKET, workers: int = 1) -> dict[str, Any]:
    """Return the toolkit's own DeepSpeed configuration; of the number of workers only hpZ's groups depend.

    The loop marks step boundaries itself, so one call of `step` is one optimizer step (accumulation 1 here) and
    DeepSpeed never sees the batch arithmetic. `parameters` bounds the buckets. Otherwise they would take a gigabyte
    beside a model of a few megabytes.
    """
    return {
        "train_micro_batch_size_per_gpu": get_micro_batch(config),
        "gradient_accumulation_steps": 1,
        # DeepSpeed's default became 1.0; an explicit 0 means none. At stages 0 and 1 the engine clips.
        "gradient_clipping": config.optim.max_grad_norm if int(config.engine.zero_stage) >= 2 else 0.0,
        "zero_optimization": {
            **_build_zero_block(config.engine, parameters),
            **_build_hierarchy_block(config.engine, workers),
            **_build_leaf_block(config),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": config.engine.communication_data_type,
        "steps_per_print": _NEVER,
        **_build_precision_blocks(config),
    }


def _build_zero_block(engine: EngineConfig, parameters: int) -> dict[str, Any]:
    # Stage 1 is the engine's own (engine/sharded_master_weights.py): DeepSpeed runs forward and backward as at stage 0.
    # overlap_comm adds a second bucket, by default at stage 3 only; off at all stages gives one reduction order.
    stage = int(engine.zero_stage)
    host = {"device": "cpu", "pin_memory": True}
    offloads = {"optimizer": ["offload_optimizer"], "optimizer_and_weights": ["offload_optimizer", "offload_param"]}
    return {
        "stage": stage if stage >= 2 else 0,
        **(dict.fromkeys(offloads.get(engine.offload, []), host) if stage == 3 else {}),
        "overlap_comm": False,
        "reduce_bucket_size": min(parameters, _REDUCE_BUCKET),
        "allgather_bucket_size": min(parameters, _BUCKET),
    }


def _build_hierarchy_block(engine: EngineConfig, workers: int) -> dict[str, Any]:
    """Return the second partition of stage 3 over the workers of a node, if such groups divide the workers."""
    size = engine.zero_hpz_partition_size
    if int(engine.zero_stage) < 3 or size == 1 or workers % size:
        return {}
    return {"zero_hpz_partition_size": size}


def _build_leaf_block(config: Config) -> dict[str, Any]:
    """Return the setting by which stage 3 gathers a layer's experts and adapters at once, before peft adds them up.

    Without it DeepSpeed 0.19.8 gathers each when it is read, one by one; the gradients are the same.
    """
    lora = config.model.lora
    if int(config.engine.zero_stage) < 3 or lora is None or not lora.target_parameters:
        return {}
    return {"leaf_module": {"classes": ["peft.tuners.lora.layer.ParamWrapper"]}}


def _build_precision_blocks(config: Config) -> dict[str, Any]:
    """Return the precision blocks; empty for fp32 and at stages 0 and 1, where the engine has the fp32 weights."""
    if config.train.precision == "fp32" or int(config.engine.zero_stage) < 2:
        return {}
    # With the check DeepSpeed skips an overflowing update instead of writing NaN into the weights; the engine
    # reads the skip, and the loop stops with an error.
    return {
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def merge_nested(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`, merged block by block."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        result[key] = merge_nested(below, value) if both else value  # type: ignore[arg-type]  # checked by `both`
    return result


def find_deepspeed_problems(given: Mapping[str, Any]) -> tuple[Problem, ...]:
    """Return the keys of `engine.deepspeed` that the toolkit owns or DeepSpeed removed; empty if it can be merged."""
    zero = given.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return (
            Problem(
                "deepspeed-block",
                "engine.deepspeed.zero_optimization",
                f"{zero!r} is not a block of keys",
                "Write a mapping",
            ),
        )
    keys = [*given, *(f"zero_optimization.{key}" for key in zero)]
    owned = (
        Problem("deepspeed-owned-key", f"engine.deepspeed.{key}", "the toolkit owns this key", OWNED_KEYS[key])
        for key in keys
        if key in OWNED_KEYS
    )
    gone = (
        Problem(
            "deepspeed-removed-key",
            f"engine.deepspeed.{key}",
            "DeepSpeed 0.19 has removed this and refuses it",
            "Remove the key",
        )
        for key in keys
        if key in REMOVED_KEYS
    )
    return (*owned, *gone)
