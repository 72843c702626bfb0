"""Building a model: from a shape with random weights, or from a directory of weights.

The weights of a model from scratch are written afterwards by `initial.initialize`; ZeRO-3 wraps the
call in `engine.partitioned`, so that no rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models.weights import UNREADABLE, place_of, read_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    hf_config: Mapping[str, Any],
    *,
    precision: str,
    attention: str,
    path: str | None = None,
    activation_checkpointing: bool = False,
) -> nn.Module:
    """A causal language model of the given Hugging Face configuration, with the weights at `path` if there is one.

    Weights must have passed `weights.check_weights`. Raises CheckpointError when they cannot be read, and PlanError
    when they are of another family than the configuration.
    """
    dtype = DTYPES[precision]
    if path is None:
        config = AutoConfig.for_model(**hf_config)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        model = _load(path, hf_config["model_type"], dtype, attention)
    model.config.use_cache = False  # a cache object switches the isolation of packed documents off
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(model, nn.Module)
    return model


def _load(path: str, model_type: str, dtype: torch.dtype, attention: str) -> Any:  # noqa: ANN401 - transformers has no types
    config = read_config(path, model_type)
    try:
        return AutoModelForCausalLM.from_pretrained(
            place_of(path), config=config, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    except UNREADABLE as error:
        raise CheckpointError(f"model.path = {path}: the weights cannot be loaded: {error}") from error


def check_size(model: nn.Module, expected: int, name: str) -> None:
    """Refuse weights of another size than the plan counted on."""
    found = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    if found != expected:
        raise PlanError(
            f"model.path holds {found:,} parameters, {name} has {expected:,}: "
            "correct model.name, or point model.path at the weights of that size"
        )
