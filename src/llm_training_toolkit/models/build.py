"""Construction of a model, from a configuration with random weights or from a directory of weights.

`initialize_weights` writes the weights of a model from scratch afterwards. The caller wraps `build_model` in
`zero3_init`, so that under ZeRO-3 no rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models.check_weights import (
    LOAD_ERRORS,
    format_weight_misfit,
    read_hf_config,
    resolve_model_path,
)
from llm_training_toolkit.models.checkpointing import enable_activation_checkpointing
from llm_training_toolkit.models.weight_stream import WeightStream, load_in_order
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    hf_config: Mapping[str, Any],
    *,
    precision: str,
    attention: str,
    path: str | None = None,
    stream: WeightStream | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    four_bits: bool = False,
    device: torch.device | None = None,
) -> nn.Module:
    """Build a causal language model of the given Hugging Face configuration, with the weights at `path` if given.

    Weights must have passed `check_pretrained_weights`. With `stream`, of the same weights, they are loaded on its
    device by all ranks together; `four_bits` keeps their matrices in 4 bits (NF4). Without `path` the parameters are
    moved to `device` one by one as they are made. Raises CheckpointError when weights cannot be read, PlanError when
    they are of another family than the configuration.
    """
    dtype = DTYPES[precision]
    if path is None:
        config = AutoConfig.for_model(**hf_config)
        with _parameters_on(device) if device is not None else nullcontext():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    elif stream is None:
        model = _load_pretrained(path, hf_config.get("model_type"), dtype, attention)
    else:
        model = _load_streamed(stream, path, hf_config.get("model_type"), dtype, attention, four_bits=four_bits)
    if getattr(model.config, "num_experts", None):
        # transformers' default, but it would fall back on a loop over experts without a word: 56 times the time of a
        # layer with 128 experts in fp32 on a CPU, because each expert's gradient is a tensor for all (docs/models.md).
        model.set_experts_implementation("grouped_mm")
    model.config.use_cache = False  # a cache object disables the isolation of packed documents
    enable_activation_checkpointing(model, activation_checkpointing)
    assert isinstance(model, nn.Module)
    return model


@contextmanager
def _parameters_on(device: torch.device) -> Iterator[None]:
    """Move each parameter to a device when a module takes it, so that host memory holds one at a time.

    Buffers stay: torch's `with device` would compute rotary frequencies there, rounded otherwise than on a CPU.
    """
    register = nn.Module.register_parameter

    def register_on_device(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != device.type:
            param = nn.Parameter(param.to(device), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_device  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _load_pretrained(path: str, model_type: str | None, dtype: torch.dtype, attention: str) -> Any:  # noqa: ANN401
    config = read_hf_config(path, model_type)
    try:
        return AutoModelForCausalLM.from_pretrained(
            resolve_model_path(path), config=config, dtype=dtype, use_safetensors=True, attn_implementation=attention
        )
    except LOAD_ERRORS as error:
        raise _build_load_error(path, error) from error


def _load_streamed(
    stream: WeightStream, path: str, model_type: str | None, dtype: torch.dtype, attention: str, *, four_bits: bool
) -> Any:  # noqa: ANN401
    """Load the tensors of `stream` as transformers loads those of files.

    Collective. Raises CheckpointError on every rank if one of them cannot load the weights or they do not fit.
    """
    config = read_hf_config(path, model_type)
    with stream.raise_together(lambda error: _build_load_error(path, error)), load_in_order():
        # Not through AutoModelForCausalLM, which needs a path.
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=stream.get_state_dict(),
            device_map={"": stream.device},
            quantization_config=_build_nf4_config(dtype) if four_bits else None,
            output_loading_info=True,
            dtype=dtype,
            attn_implementation=attention,
        )
        if misfit := format_weight_misfit(info):
            raise CheckpointError(f"model.path = {path}: the weights do not fit the model: {misfit}")
    model.config.name_or_path = model.name_or_path = resolve_model_path(path)
    return model


def _build_load_error(path: str, error: Exception) -> CheckpointError:
    """Return the error of weights that cannot be loaded, with the type of an unexpected exception such as KeyError."""
    what = str(error) if isinstance(error, LOAD_ERRORS) else f"{type(error).__name__}: {error}"
    return CheckpointError(f"model.path = {path}: the weights cannot be loaded: {what}")


def _build_nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the configuration of NF4 with double quantization, as in QLoRA; products are computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_parameter_count(found: int, expected: int, name: str) -> None:
    """Raise PlanError if the weights have another size than the plan assumes."""
    if found != expected:
        raise PlanError(
            f"model.path holds {found:,} parameters, {name} has {expected:,}: "
            "correct model.name, or point model.path at the weights of that size"
        )


def count_parameters(model: nn.Module) -> int:
    """Return the number of weights of a model, even if partitioned or packed."""
    return sum(_count_weights(parameter) for parameter in model.parameters())


def _count_weights(parameter: nn.Parameter) -> int:
    packed = 2 if type(parameter).__name__ == "Params4bit" else 1  # two weights a byte
    return packed * int(getattr(parameter, "ds_numel", parameter.numel()))
