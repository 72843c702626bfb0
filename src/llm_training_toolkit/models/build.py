"""Building a model: from a shape with random weights, or from a directory of weights.

The weights of a model from scratch are written afterwards by `initial.initialize`; ZeRO-3 wraps the
call in `engine.partitioned`, so that no rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from llm_training_toolkit.errors import CheckpointError, PlanError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

_DROPOUTS = {"attention_dropout", "residual_dropout", "embedding_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"}
"""Set to 0 for loaded weights too. StarCoder's base configurations carry 0.1, which makes the loss depend on how a
batch is split; StarCoder2-Instruct was trained with 0 (bigcode-project/starcoder2-self-align)."""


def build_model(
    hf_config: Mapping[str, Any],
    *,
    precision: str,
    attention: str,
    path: str | None = None,
    activation_checkpointing: bool = False,
    four_bits_on: torch.device | None = None,
) -> nn.Module:
    """A causal language model of the given Hugging Face configuration, with the weights at `path` if there is one.

    `four_bits_on` keeps the matrices of loaded weights in 4 bits (NF4) on that GPU. Raises CheckpointError when weights
    are missing, left over or of another shape.
    """
    dtype = DTYPES[precision]
    if path is None:
        config = AutoConfig.for_model(**hf_config)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        local = Path(path).expanduser()
        how = {"attn_implementation": attention} | (_four_bits(dtype, four_bits_on) if four_bits_on else {})
        model = _load(str(local) if local.exists() else path, dtype, how)
    model.config.use_cache = False  # a cache object switches the isolation of packed documents off
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(model, nn.Module)
    return model


def _four_bits(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """NF4 with constants that are quantized themselves, as in QLoRA; products are computed in `dtype`."""
    kind = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": kind, "device_map": {"": device}}


def _load(path: str, dtype: torch.dtype, how: Mapping[str, Any]) -> Any:  # noqa: ANN401 - transformers has no types
    try:
        config = AutoConfig.from_pretrained(path)
        for name in _DROPOUTS & set(config.to_dict()):
            setattr(config, name, 0.0)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, output_loading_info=True, **how
        )
    except (OSError, ImportError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"model.path = {path}: no weights can be loaded from there: {error}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        found = "; ".join(f"{kind}: {', '.join(names[:3])} ({len(names)} in all)" for kind, names in wrong.items())
        raise CheckpointError(f"model.path = {path}: the weights do not fit the model: {found}")
    return model


def check_size(model: nn.Module, expected: int, name: str) -> None:
    """Refuse weights of another size than the plan counted on."""
    found = sum(_size(parameter) for parameter in model.parameters())
    if found != expected:
        raise PlanError(
            f"model.path holds {found:,} parameters, {name} has {expected:,}: "
            "correct model.name, or point model.path at the weights of that size"
        )


def _size(parameter: nn.Parameter) -> int:
    """Weights of a parameter, wherever they lie and however they are packed."""
    packed = 2 if type(parameter).__name__ == "Params4bit" else 1  # two weights a byte
    return packed * int(getattr(parameter, "ds_numel", parameter.numel()))
