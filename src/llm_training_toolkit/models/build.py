"""Construction of a model, from a configuration with random weights or from a directory of weights.

`initialize_weights` writes the weights of a model from scratch afterwards. The caller wraps `build_model` in
`zero3_init`, so that under ZeRO-3 no rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models.check_weights import LOAD_ERRORS, read_hf_config, resolve_model_path
from llm_training_toolkit.models.checkpointing import enable_activation_checkpointing
from llm_training_toolkit.plan.activations import ActivationCheckpointing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    hf_config: Mapping[str, Any],
    *,
    precision: str,
    attention: str,
    path: str | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    four_bits_on: torch.device | None = None,
) -> nn.Module:
    """Build a causal language model of the given Hugging Face configuration, with the weights at `path` if given.

    Weights must have passed `check_pretrained_weights`. With `four_bits_on` the matrices of loaded weights are kept in
    4 bits (NF4) on that GPU. Raises CheckpointError when weights cannot be read, PlanError when they are of another
    family than the configuration.
    """
    dtype = DTYPES[precision]
    if path is None:
        config = AutoConfig.for_model(**hf_config)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        how = {"attn_implementation": attention} | (_build_nf4_options(dtype, four_bits_on) if four_bits_on else {})
        model = _load_pretrained(path, hf_config.get("model_type"), dtype, how)
    model.config.use_cache = False  # a cache object disables the isolation of packed documents
    enable_activation_checkpointing(model, activation_checkpointing)
    assert isinstance(model, nn.Module)
    return model


def _build_nf4_options(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the options for NF4 with double quantization, as in QLoRA; products are computed in `dtype`."""
    kind = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": kind, "device_map": {"": device}}


def _load_pretrained(path: str, model_type: str | None, dtype: torch.dtype, how: Mapping[str, Any]) -> Any:  # noqa: ANN401
    config = read_hf_config(path, model_type)
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model_path(path), config=config, dtype=dtype, use_safetensors=True, **how
        )
    except LOAD_ERRORS as error:
        raise CheckpointError(f"model.path = {path}: the weights cannot be loaded: {error}") from error


def check_parameter_count(model: nn.Module, expected: int, name: str) -> None:
    """Raise PlanError if the weights have another size than the plan assumes."""
    found = sum(_count_parameters(parameter) for parameter in model.parameters())
    if found != expected:
        raise PlanError(
            f"model.path holds {found:,} parameters, {name} has {expected:,}: "
            "correct model.name, or point model.path at the weights of that size"
        )


def _count_parameters(parameter: nn.Parameter) -> int:
    """Return the number of weights of a parameter, even if partitioned or packed."""
    packed = 2 if type(parameter).__name__ == "Params4bit" else 1  # two weights a byte
    return packed * int(getattr(parameter, "ds_numel", parameter.numel()))
