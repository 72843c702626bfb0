"""DeepSpeed setup of a process, and construction of models partitioned by ZeRO-3. Called before a model exists."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from llm_training_toolkit.engine.compile_cache import set_compile_cache_dirs


def prepare_deepspeed(device_type: str) -> None:
    """Choose DeepSpeed's accelerator. Must run before the first `import deepspeed`.

    On CPU DeepSpeed would compile its shared-memory collectives at the first start (50 to 80 s and a C++ compiler).
    DeepSpeed uses them only when LOCAL_SIZE equals the world size; Ray Train and torchrun leave it unset. So they are
    declared unavailable; gloo does the work either way. DeepSpeed 0.19.8 fills that table at the first look, by running
    compilers and asking GPUs for each of some twenty operators; on GPUs nothing looks into it.
    """
    if device_type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    set_compile_cache_dirs()
    import deepspeed  # noqa: PLC0415 - the accelerator is chosen at import

    if device_type == "cpu":
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon_uncompiled()


def _import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon, unused here, without torch.compile.

    Every ZeRO optimizer imports it only to check whether it is in use (DeepSpeed 0.19.8,
    `is_zero_supported_optimizer`). Its decorators load torch's whole compiler: 0.9 s at every start of every rank.
    """
    from deepspeed.runtime import compiler  # noqa: PLC0415 - after the accelerator is chosen

    kept = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = kept


@contextmanager
def zero3_init(deepspeed_config: Mapping[str, Any]) -> Iterator[None]:
    """Make transformers build models already partitioned inside the block, if the configuration says ZeRO-3.

    Uses transformers' own route (HfDeepSpeedConfig), because a bare `zero.Init` leaves out transformers' construction
    steps for the weights. The setting is global, so it ends with the block.
    """
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config  # noqa: PLC0415

    _forget_node_groups()
    keep_alive = HfDeepSpeedConfig(dict(deepspeed_config))
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def _forget_node_groups() -> None:
    """Drop the groups of an earlier engine: DeepSpeed 0.19.8 asserts that a process makes those of hpZ once."""
    from deepspeed.utils import groups  # noqa: PLC0415

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # noqa: SLF001


@contextmanager
def gathered_parameter(parameter: nn.Parameter) -> Iterator[None]:
    """Gather a partitioned parameter for writing; all ranks keep the values that rank 0 wrote."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed  # noqa: PLC0415 - only ZeRO-3 comes here

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield
