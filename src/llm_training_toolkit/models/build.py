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
from transformers import AutoConfig, AutoModelForCausalLM

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.families import DROPOUTS

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

    Raises CheckpointError when weights are missing, left over or of another shape, and PlanError when they are of
    another family than the configuration.
    """
    dtype = DTYPES[precision]
    if path is None:
        config = AutoConfig.for_model(**hf_config)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        local = Path(path).expanduser()
        model = _load(str(local) if local.exists() else path, hf_config["model_type"], dtype, attention)
    model.config.use_cache = False  # a cache object switches the isolation of packed documents off
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert isinstance(model, nn.Module)
    return model


def _load(path: str, model_type: str, dtype: torch.dtype, attention: str) -> Any:  # noqa: ANN401 - transformers has no types
    try:
        # trust_remote_code off in so many words: left out, transformers asks at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != model_type:
            raise PlanError(f"model.path = {path} holds a {config.model_type} model, model.name is of {model_type}")
        for name in set(DROPOUTS) & set(config.to_dict()):
            setattr(config, name, 0.0)
        model, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ImportError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"model.path = {path}: no weights can be loaded from there: {_reason(error)}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        found = "; ".join(f"{kind}: {', '.join(names[:3])} ({len(names)} in all)" for kind, names in wrong.items())
        raise CheckpointError(f"model.path = {path}: the weights do not fit the model: {found}")
    _check_tied(path, model)
    return model


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "its classes are code in its own repository, which is never run here: use weights that transformers knows"
        )
    return str(error)


def _check_tied(path: str, model: Any) -> None:  # noqa: ANN401 - transformers has no types
    """transformers leaves embedding and output layer apart when a file holds two different ones; it only logs that."""
    if (
        model.config.tie_word_embeddings
        and model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    ):
        raise CheckpointError(
            f"model.path = {path}: config.json says that embedding and output layer are one, the weights hold two "
            "different ones: correct tie_word_embeddings there"
        )


def check_size(model: nn.Module, expected: int, name: str) -> None:
    """Refuse weights of another size than the plan counted on."""
    found = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())
    if found != expected:
        raise PlanError(
            f"model.path holds {found:,} parameters, {name} has {expected:,}: "
            "correct model.name, or point model.path at the weights of that size"
        )
