"""LoRA adapters beside linear layers, by peft: the model is frozen, two small matrices a layer are trained.

Adapters are injected in place, before DeepSpeed wraps the model. All other modules keep name and class, so that the
loss, packed documents and checkpoints work unchanged.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import set_additional_trainable_modules
from torch import Tensor, nn

from llm_training_toolkit.families.lora import AdapterSpec
from llm_training_toolkit.models.dropout import BatchPosition, SequenceDropout
from llm_training_toolkit.models.init_weights import build_generator

_EXPERTS = "mlp.experts"  # module of the fused experts, in all classes
ADAPTER_NAME = "default"  # peft's name for the only adapter of a model


def build_lora_config(adapter: AdapterSpec, base: str | None = None) -> LoraConfig:
    """Build peft's configuration of the adapters; `base` names their base model."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets),
        target_parameters=[f"{_EXPERTS}.{each.name}" for each in adapter.experts] or None,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=list(adapter.modules_to_save) or None,
        base_model_name_or_path=base,
    )


def add_adapters(
    model: nn.Module, adapter: AdapterSpec, *, seed: int, dtype: torch.dtype, draws: BatchPosition | None = None
) -> None:
    """Freeze a transformers model and inject trainable adapters of `dtype`.

    Initial weights are a pure function of (seed, parameter name): A uniform as in nn.Linear, B zero, so that the model
    is unchanged at first. A head must become a `LossHead` before this call, because peft trains a copy of a module that
    is trained whole. Dropout needs `draws`.
    """
    config = build_lora_config(replace(adapter, dropout=0.0))  # peft's own dropout depends on how a batch is split
    inject_adapter_in_model(config, model)
    set_additional_trainable_modules(model, config, model.config.to_dict(), ADAPTER_NAME)  # type: ignore[union-attr, operator]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.to(dtype)  # beside 4-bit weights peft leaves them in fp32
        if ".lora_A." in name:
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=build_generator(seed, name))
            parameter.data.copy_(values)
    if adapter.dropout and draws is not None:
        for name, layer in find_lora_layers(model).items():
            layer.lora_dropout[ADAPTER_NAME] = SequenceDropout(adapter.dropout, seed, name, draws)


def name_expert_adapter(parameter: str, adapter: AdapterSpec) -> str | None:
    """Return the module that holds the adapter of a tensor of experts, or None if it has none.

    peft wraps the module of the experts once for each of its tensors, the first one innermost.
    """
    module, _, name = parameter.rpartition(".")
    names = [each.name for each in adapter.experts]
    if not module.endswith(f".{_EXPERTS}") or name not in names:
        return None
    return module + ".base_layer" * (len(names) - 1 - names.index(name))


def compute_expert_delta(first: Tensor, second: Tensor, experts: int) -> Tensor:
    """Return what adapters add to a tensor of experts (E, out, in), unscaled: A is (r E, in), B (out, r E).

    The layout is peft's `ParamWrapper`: of A the experts come first, of B the ranks.
    """
    stacked = first.reshape(experts, -1, first.shape[-1])
    return torch.einsum("ore,eri->eoi", second.reshape(len(second), -1, experts), stacked)


def find_lora_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
