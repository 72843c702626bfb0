"""Problems of `engine.tensor_parallel`: sizes that its ranks do not divide, and settings that it excludes."""

from __future__ import annotations

from collections.abc import Iterator

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import HfValues, ModelDims, ModelSize
from llm_training_toolkit.plan.checks.sequence_check import SEQUENCE_PARALLEL_KEY
from llm_training_toolkit.plan.problem import Problem, format_plural

TENSOR_PARALLEL_KEY = "engine.tensor_parallel"


def find_tensor_problems(config: Config, size: ModelSize, hf: HfValues, sizes: tuple[int, int]) -> Iterator[Problem]:
    """Find reasons against ranks that share matrices; `sizes` = (fewest, most) ranks of the run."""
    if config.engine.tensor_parallel == 1:
        return
    dims = families.read_model_dims(hf)
    yield from _find_uneven_problems(config, size, dims, sizes)
    yield from _find_model_problems(config, size, dims)
    yield from _find_excluded_settings(config)


def _find_uneven_problems(
    config: Config, size: ModelSize, dims: ModelDims, sizes: tuple[int, int]
) -> Iterator[Problem]:
    """Find workers, heads and widths that the ranks of a replica do not divide."""
    each = config.engine.tensor_parallel
    uneven = [workers for workers in dict.fromkeys(sizes) if workers % each]
    if uneven:
        wrong = " and ".join(format_plural(workers, "worker") for workers in uneven)
        fix = f"Use a multiple of {each} workers, or another {TENSOR_PARALLEL_KEY}"
        yield Problem("tensor-parallel-workers", "cluster.workers", f"{each} do not divide {wrong}", fix)
    widths = (dims.heads, dims.kv_heads, dims.intermediate)
    if any(width % each for width in widths):
        what = (
            f"{each} do not divide the {dims.heads} query heads, {dims.kv_heads} key-value heads and feed-forward "
            f"width {dims.intermediate:,} of {size.name}"
        )
        possible = [number for number in range(1, dims.kv_heads + 1) if not any(width % number for width in widths)]
        yield Problem("tensor-parallel-heads", TENSOR_PARALLEL_KEY, what, f"Use {' or '.join(map(str, possible))}")


def _find_model_problems(config: Config, size: ModelSize, dims: ModelDims) -> Iterator[Problem]:
    """Find layers that are not cut."""
    instead = "Set it to 1; engine.zero_stage 3 spreads the weights of any model"
    layers = {
        "linear attention": dims.linear_attention is not None,
        "experts": dims.experts > 0,
        "one matrix for queries, keys and values": dims.positions > 0,
    }
    named = [name for name, holds in layers.items() if holds]
    if named:
        what = f"{size.name} has {' and '.join(named)}, which it does not cut"
        yield Problem("tensor-parallel-model", TENSOR_PARALLEL_KEY, what, instead)
    if config.model.lora is not None:
        what = "adapters beside matrices that are cut are not built"
        yield Problem("tensor-parallel-lora", "model.lora", what, f"Remove it, or {TENSOR_PARALLEL_KEY}: {instead}")


def _find_excluded_settings(config: Config) -> Iterator[Problem]:
    """Find settings that take whole matrices, or another cut of them."""
    engine, each = config.engine, config.engine.tensor_parallel
    if engine.zero_stage not in {"auto", 0, 1}:
        what = f"ZeRO {engine.zero_stage} is DeepSpeed's, which would sum the gradients of different slices"
        fix = f"Set it to 0, 1 or auto: {each} workers hold a slice of weights and gradients each already"
        yield Problem("tensor-parallel-stage", "engine.zero_stage", what, fix)
    if engine.offload == "optimizer_and_weights":
        what = "it is of ZeRO 3, which shards weights by itself"
        yield Problem(
            "tensor-parallel-offload", "engine.offload", what, f"Use optimizer or none, or remove {TENSOR_PARALLEL_KEY}"
        )
    if engine.zero_hpz_partition_size > 1:
        what = "it is of ZeRO 3, which shards weights by itself"
        fix = f"Remove it, or remove {TENSOR_PARALLEL_KEY}"
        yield Problem("tensor-parallel-hierarchy", "engine.zero_hpz_partition_size", what, fix)
    if engine.deepspeed.get("zero_optimization"):
        what = "DeepSpeed reads it from ZeRO 2 on"
        fix = f"Remove it, or remove {TENSOR_PARALLEL_KEY}"
        yield Problem("tensor-parallel-deepspeed", "engine.deepspeed.zero_optimization", what, fix)
    if engine.sequence_parallel > 1:
        what = (
            f"workers cannot share matrices and tokens at once ({SEQUENCE_PARALLEL_KEY} = {engine.sequence_parallel})"
        )
        fix = f"Set one of them to 1; {SEQUENCE_PARALLEL_KEY} is for long rows, this one for large weights"
        yield Problem("tensor-parallel-sequence", TENSOR_PARALLEL_KEY, what, fix)
