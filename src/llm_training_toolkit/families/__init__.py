"""Registry of model families: sizes, Hugging Face configurations, parameter and FLOP counts. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from llm_training_toolkit.config.model_config import ModelConfig
from llm_training_toolkit.config.run_identity import normalize_model_name
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families import qwen, qwen3_5, starcoder
from llm_training_toolkit.families.family import (
    DROPOUTS,
    CodeLayout,
    Family,
    HfValues,
    ModelDims,
    ModelSize,
    SpecialTokens,
)
from llm_training_toolkit.families.flops import TrainingFlops, compute_training_flops
from llm_training_toolkit.families.hf_config import build_hf_config as build_hf_config
from llm_training_toolkit.families.hf_config import read_saved_config, read_saved_dropout
from llm_training_toolkit.families.lora import AdapterSpec, build_adapter

__all__ = [
    "DROPOUTS",
    "FAMILIES",
    "SIZES",
    "AdapterSpec",
    "CodeLayout",
    "Family",
    "HfValues",
    "ModelDims",
    "ModelSize",
    "SpecialTokens",
    "TrainingFlops",
    "compute_flops_per_token",
    "count_parameters",
    "find_run_size",
    "find_size",
    "list_models_with_tokens",
    "read_model_dims",
    "read_saved_dropout",
    "resolve_adapter",
    "resolve_hf_config",
    "resolve_training_flops",
]

# All known sizes by name.
SIZES: dict[str, ModelSize] = {size.name: size for size in (*qwen.SIZES, *qwen3_5.SIZES, *starcoder.SIZES)}
_BY_NAME: dict[str, ModelSize] = {name: size for size in SIZES.values() for name in (size.name, *size.other_names)}
FAMILIES: dict[str, Family] = {size.family.name: size.family for size in SIZES.values()}  # all families by name
_BY_TYPE: dict[str, Family] = {family.model_type: family for family in FAMILIES.values()}
_TUNED_SUFFIXES = ("-instruct", "-chat", "-base")  # of weights that have the shape of the ones without


def list_models_with_tokens(markers: Iterable[str]) -> list[str]:
    """Return the sizes whose family has all of some special tokens."""
    return [name for name, size in SIZES.items() if set(markers) <= set(size.family.special_tokens.all)]


def find_size(name: str) -> ModelSize:
    """Return the size with this name: the hub name of its weights, in any case, with or without organization.

    Raises PlanError with the nearest names if there is none.
    """
    wanted = normalize_model_name(name)
    bare = next((wanted.removesuffix(suffix) for suffix in _TUNED_SUFFIXES if wanted.endswith(suffix)), wanted)
    for known in (wanted, bare):
        if known in _BY_NAME:
            return _BY_NAME[known]
    near = difflib.get_close_matches(bare, _BY_NAME, n=4, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(SIZES)}."
    raise PlanError(f"model.name = {name}: no known size has this name. {hint}")


def find_run_size(model: ModelConfig) -> ModelSize:
    """Return the size of a run's model by its name.

    Raises PlanError for an unknown one. For weights in a directory it then names the sizes of the shape in their
    config.json instead of the nearest names: a run must know its size also on machines without the weights.
    """
    try:
        return find_size(model.name)
    except PlanError:
        fitting = _list_sizes_of_weights(model.path) if model.path is not None else []
        if not fitting:
            raise
    said = " and ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))
    raise PlanError(
        f"model.name = {model.name}: no known size has this name. The weights in {model.path} have the shape "
        f"of {said}: set model.name to {'the one they were made from' if len(fitting) > 1 else fitting[0]}"
    )


def _list_sizes_of_weights(path: str) -> list[str]:
    """Return the sizes of the shape in the config.json of a directory, the number of embedding rows left out."""
    found = read_saved_config(path)
    if found is None or (family := _BY_TYPE.get(found.get("model_type", ""))) is None:
        return []
    try:
        wanted = replace(read_model_dims({**family.defaults, **found}), vocab=0)
    except (KeyError, TypeError):  # incomplete, which loading will say
        return []
    candidates = (size for size in SIZES.values() if size.family.model_type == family.model_type)
    return [size.name for size in candidates if replace(size.family.read_dims(size.hf_values), vocab=0) == wanted]


def resolve_hf_config(config: Config) -> dict[str, Any]:
    """Return the complete Hugging Face configuration of the run's model, without a dtype.

    With `model.init_from` or a local `model.path` it has the values of the saved weights, and loaded weights are
    compared with it. The maximum position is at least `data.sequence_length`, except with learned positions (StarCoder
    1). Lists that transformers derives itself (layer_types) are left out. Raises PlanError for an unknown size or an
    impossible shape.
    """
    return build_hf_config(config, find_size(config.model.name))


def read_model_dims(hf: HfValues) -> ModelDims:
    """Return the family-independent dimensions of a Hugging Face configuration, also of one saved by transformers."""
    family = _BY_TYPE[hf["model_type"]]
    names = {saved: name for name, saved in family.saved_as.items()}
    return family.read_dims({names.get(name, name): value for name, value in hf.items()})


def count_parameters(hf: HfValues) -> int:
    """Return the number of parameters of a Hugging Face configuration; tied embeddings count once."""
    return read_model_dims(hf).total_parameters


def resolve_adapter(config: Config, hf: HfValues) -> AdapterSpec | None:
    """Return the adapters that a run trains, or None if it trains the model itself."""
    lora = config.model.lora
    return None if lora is None else build_adapter(lora, find_size(config.model.name).family, read_model_dims(hf))


def compute_flops_per_token(hf: HfValues, sequence_length: int, beside: AdapterSpec | None = None) -> int:
    """Return the FLOPs of one token's forward and backward pass in a whole sequence of one document: 6 N + 12 L Q T.

    N = parameters that multiply a token: matrices and output layer, without embedding lookup and unused experts. L =
    layers with attention, Q = heads x head_dim and T = attended tokens (the sequence, or the sliding window if
    shorter). An upper bound: packed documents attend to less, and only tokens with a loss reach the output layer.
    """
    flops = resolve_training_flops(hf, beside)
    return flops.count_step_flops(1, 1, min(sequence_length, flops.window or sequence_length))


def resolve_training_flops(hf: HfValues, beside: AdapterSpec | None = None) -> TrainingFlops:
    """Return the FLOPs of training a model of this Hugging Face configuration, or the adapters beside it."""
    return compute_training_flops(read_model_dims(hf), beside)
