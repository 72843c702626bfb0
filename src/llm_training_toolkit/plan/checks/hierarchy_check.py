"""Problems of `engine.zero_hpz_partition_size`: settings that exclude a second partition, and sizes without one."""

from __future__ import annotations

import math
from collections.abc import Iterator

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan.problem import Problem, format_plural

HIERARCHY_KEY = "engine.zero_hpz_partition_size"


def find_hierarchy_problems(config: Config, ranks: int | None) -> Iterator[Problem]:
    """Find a second partition that other settings or all sizes of the run rule out; `ranks` = those started, if any."""
    if config.engine.zero_hpz_partition_size == 1:
        return
    yield from _find_excluding_settings(config)
    yield from _find_size_problems(config, ranks)


def _find_excluding_settings(config: Config) -> Iterator[Problem]:
    """Find settings that exclude ZeRO 3 or the copy itself."""
    engine, lora, size = config.engine, config.model.lora, config.engine.zero_hpz_partition_size
    if engine.zero_stage not in {"auto", 3}:
        what = f"ZeRO {engine.zero_stage} shards no weights, and {HIERARCHY_KEY} = {size} gathers sharded ones"
        yield Problem("hierarchy-stage", "engine.zero_stage", what, f"Set it to 3, or remove {HIERARCHY_KEY}")
    if engine.offload == "optimizer_and_weights":
        what = f"it moves the weights to the host, and {HIERARCHY_KEY} = {size} keeps a copy of them on the devices"
        yield Problem("hierarchy-offload", "engine.offload", what, f"Use optimizer or none, or remove {HIERARCHY_KEY}")
    if config.model.compile is True:
        what = f"{size} needs ZeRO 3, at which layers cannot be compiled, and model.compile is true"
        yield Problem("hierarchy-compile", HIERARCHY_KEY, what, "Remove it, or set model.compile to auto")
    if lora is not None and lora.quantize is not None:
        what = f"{size} needs ZeRO 3, which cannot shard 4-bit weights (model.lora.quantize = {lora.quantize})"
        yield Problem("hierarchy-quantize", HIERARCHY_KEY, what, "Remove it, or remove model.lora.quantize")


def _find_size_problems(config: Config, ranks: int | None) -> Iterator[Problem]:
    """Find workers that groups of this size never divide; without Ray only the ranks that were started are known."""
    size, fewest, most = config.engine.zero_hpz_partition_size, config.cluster.min_workers, config.cluster.max_workers
    if fewest < most:
        each = math.lcm(size, config.engine.ranks_per_replica)  # an elastic run has whole replicas at every size
        whole, named = most // each * each >= fewest, f"no number from {fewest} to {most} workers"
    else:
        workers = ranks or most
        whole, named = workers % size == 0, f"not {format_plural(workers, 'worker')}"
    if not whole:
        what = f"groups of {size} ({HIERARCHY_KEY}) divide {named}"
        fix = f"Use a multiple of {size} workers, or groups as large as a node's workers"
        yield Problem("hierarchy-workers", "cluster.workers", what, fix)
