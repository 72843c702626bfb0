"""Problems of `model.lora`: layers that the model lacks, and settings that contradict each other."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence

from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.families import HfValues, ModelDims, ModelSize
from llm_training_toolkit.families.lora import get_fully_trainable_modules
from llm_training_toolkit.plan.problem import Problem

_EXPERT_MATRICES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def find_lora_problems(config: Config, size: ModelSize, hf: HfValues) -> Iterator[Problem]:
    """Find adapters for missing layers, and settings that 4-bit weights do not support."""
    lora, family = config.model.lora, size.family
    if lora is None:
        return
    dims, targets = family.read_dims(hf), () if lora.target_modules == "auto" else lora.target_modules
    experts = tuple(name for name in targets if dims.experts and name in _EXPERT_MATRICES)
    if experts:
        what = f"{', '.join(experts)}: the experts of {size.name} are tensors of a layer, not linear layers"
        fix = f"Name them in model.lora.target_parameters: {', '.join(dict.fromkeys(map(_get_fused_name, experts)))}"
        yield Problem("adapters-beside-experts", "model.lora.target_modules", what, fix)
    yield from _find_expert_adapter_problems(lora, size, dims)
    others = tuple(name for name in targets if name not in experts)
    yield from _find_unknown_names("model.lora.target_modules", others, family.lora_targets, size)
    whole = tuple(get_fully_trainable_modules(family, dims))
    yield from _find_unknown_names("model.lora.modules_to_save", lora.modules_to_save, whole, size)
    if dims.tied and set(lora.modules_to_save) & set(whole):
        what = f"embedding and output layer of {size.name} are one matrix, which training one of them would part"
        yield Problem(
            "tied-modules-to-save",
            "model.lora.modules_to_save",
            what,
            "Remove it, or train the whole model without lora",
        )
    yield from _find_quantization_problems(config, lora)


def _find_quantization_problems(config: Config, lora: LoraConfig) -> Iterator[Problem]:
    """Find settings that 4-bit weights do not support."""
    if lora.quantize is not None and config.engine.offload == "optimizer_and_weights":
        yield Problem(
            "quantized-offload",
            "engine.offload",
            "4-bit weights stay on the GPU: ZeRO 3, which could move them, would cut their blocks",
            "Set it to optimizer, at ZeRO 1, or to none",
        )
    elif lora.quantize is not None and config.engine.zero_stage == 3:
        what = "ZeRO 3 would cut 4-bit weights, whose blocks belong together"
        yield Problem(
            "quantized-zero-3",
            "engine.zero_stage",
            what,
            "Use 1: the weights in 4 bits are small, and only adapters have gradients",
        )
    if lora.quantize is not None and config.cluster.gpus_per_worker == 0:
        what = "4-bit weights need a GPU, and cluster.gpus_per_worker is 0"
        yield Problem(
            "quantized-without-gpu", "model.lora.quantize", what, "Remove quantize, or train where there are GPUs"
        )


def _get_fused_name(matrix: str) -> str:
    """Return the tensor of transformers 5 that an expert's matrix is part of."""
    return "down_proj" if matrix == "down_proj" else "gate_up_proj"


def _find_expert_adapter_problems(lora: LoraConfig, size: ModelSize, dims: ModelDims) -> Iterator[Problem]:
    """Find adapters of experts in a model without experts, and settings that peft's adapters of tensors lack."""
    if not lora.target_parameters:
        return
    if not dims.experts:
        what = f"{size.name} has no experts"
        yield Problem("expert-adapters-without-experts", "model.lora.target_parameters", what, "Remove it")
        return
    why = "the adapters of experts are added to their weights before any token passes"
    refused = {
        "dropout": (lora.dropout > 0, f"{why}, so that no input is left to drop"),
        "use_dora": (lora.use_dora, "peft has no DoRA for the tensors of experts"),
        "quantize": (lora.quantize is not None, f"{why}, and the weights of experts stay in 16 bits"),
    }
    for key, (is_set, what) in refused.items():
        if is_set:
            fix = f"Remove model.lora.{key}, or model.lora.target_parameters"
            yield Problem("expert-adapters-option", f"model.lora.{key}", what, fix)


def _find_unknown_names(where: str, given: Sequence[str], known: Sequence[str], size: ModelSize) -> Iterator[Problem]:
    """Find names that the family does not have, each with the nearest valid one."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"Did you mean {near[0]}? " if near else ""
            yield Problem(
                "unknown-lora-module", where, f"{size.name} has no {name!r}", f"{meant}There are: {', '.join(known)}"
            )
