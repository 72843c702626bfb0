"""Registry of model families: sizes, Hugging Face configurations, parameter and FLOP counts. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NoReturn

from llm_training_toolkit.config.model_config import ModelConfig, TokenizerConfig
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
from llm_training_toolkit.families.hf_config import (
    ASSUMED_DIMENSIONS,
    are_dimensions_assumed,
    is_plan_assumed,
    read_recorded_plan,
    read_source_plan,
    recall_plan,
    recall_plan_files,
)
from llm_training_toolkit.families.hf_config import build_hf_config as build_hf_config
from llm_training_toolkit.families.lora import AdapterSpec, build_adapter
from llm_training_toolkit.families.saved_config import (
    CONFIG_FILE,
    TOKENIZER_FILE,
    find_weights_file,
    is_hub_id,
    read_quantization,
    read_saved_config,
    read_saved_dropout,
    read_saved_dtype,
)
from llm_training_toolkit.families.saved_size import build_saved_size, choose_family, read_tokenizer_family

__all__ = [
    "ASSUMED_DIMENSIONS",
    "CONFIG_FILE",
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
    "are_dimensions_assumed",
    "check_model_type",
    "compute_flops_per_token",
    "count_parameters",
    "find_run_size",
    "find_size",
    "find_size_of_weights",
    "find_tokenizer_family",
    "find_weights_file",
    "has_known_name",
    "has_known_size",
    "is_hub_id",
    "is_plan_assumed",
    "list_models_with_tokens",
    "read_model_dims",
    "read_quantization",
    "read_recorded_plan",
    "read_saved_config",
    "read_saved_dropout",
    "read_saved_dtype",
    "recall_plan",
    "recall_plan_files",
    "resolve_adapter",
    "resolve_hf_config",
    "resolve_training_flops",
    "suggest_names",
]

# All known sizes by name.
SIZES: dict[str, ModelSize] = {size.name: size for size in (*qwen.SIZES, *qwen3_5.SIZES, *starcoder.SIZES)}
_BY_NAME: dict[str, ModelSize] = {name: size for size in SIZES.values() for name in (size.name, *size.other_names)}
FAMILIES: dict[str, Family] = {size.family.name: size.family for size in SIZES.values()}  # all families by name
# The first family of each class of transformers.
_BY_TYPE: dict[str, Family] = {family.model_type: family for family in reversed(FAMILIES.values())}
_TUNED_SUFFIXES = ("-instruct", "-chat", "-base")  # of weights that have the shape of the ones without


def list_models_with_tokens(markers: Iterable[str]) -> list[str]:
    """Return the sizes whose family has all of some special tokens."""
    return [name for name, size in SIZES.items() if set(markers) <= set(size.family.special_tokens.all)]


def find_size(name: str) -> ModelSize:
    """Return the size with this name: the hub name of its weights, in any case, with or without organization.

    Raises PlanError with the nearest names if there is none.
    """
    named = _find_named_size(name)
    if named is not None:
        return named
    hint = suggest_names(name) or f"Known: {', '.join(SIZES)}."
    raise PlanError(f"model.name = {name}: no known size has this name. {hint}")


def suggest_names(name: str) -> str:
    """Return a question with the known names nearest to an unknown one; empty without any."""
    bare = _remove_tuned_suffix(normalize_model_name(name))
    near = difflib.get_close_matches(bare, _BY_NAME, n=4, cutoff=0.5)
    return f"Did you mean {', '.join(near)}?" if near else ""


def has_known_name(name: str) -> bool:
    """Return whether a known size has this name."""
    return _find_named_size(name) is not None


def check_model_type(model_type: str, where: str) -> None:
    """Raise PlanError for a transformers model type (`model_type` of config.json) of another family."""
    if model_type not in _BY_TYPE:
        known = ", ".join(sorted(_BY_TYPE))
        raise PlanError(f"{where}: model_type is {model_type}, which is no Qwen or StarCoder here (known: {known})")


def _find_named_size(name: str) -> ModelSize | None:
    wanted = normalize_model_name(name)
    return _BY_NAME.get(wanted) or _BY_NAME.get(_remove_tuned_suffix(wanted))


def _remove_tuned_suffix(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in _TUNED_SUFFIXES if name.endswith(suffix)), name)


def find_run_size(config: Config) -> ModelSize:
    """Return the size of a run's model: by its name, else by the config.json of the weights that it is named after.

    Without a known name and without this file it is the size in the plan that the run, or the run in
    `model.init_from`, has begun with. Raises PlanError for an unknown name. Beside weights of another name, the error
    names the sizes of their shape.
    """
    size = _find_size_here(config)
    return size if size is not None else _raise_unknown_name(config.model)


def has_known_size(config: Config) -> bool:
    """Return whether the size of a run's model follows from what is on this machine; otherwise the hub has to tell."""
    return _find_size_here(config) is not None


def _find_size_here(config: Config) -> ModelSize | None:
    model = config.model
    if model.path is not None and normalize_model_name(model.name) == normalize_model_name(model.path):
        size = find_size_of_weights(model.path, model.revision, config.tokenizer)
        if size is not None:
            return size
    return _find_named_size(model.name) or _find_planned_size(config)


def find_size_of_weights(
    path: str, revision: str | None = None, tokenizer: TokenizerConfig | None = None
) -> ModelSize | None:
    """Return the size of weights in a directory or in the hub's cache: the known one of their name, or of config.json.

    `tokenizer` may be another one than that beside the weights. None without a config.json on this machine. Raises
    PlanError for a class of model that is not known, and for a size that cannot be counted.
    """
    found = read_saved_config(path, revision)
    if found is None:
        return None
    model_type, name = str(found.get("model_type")), normalize_model_name(path)
    named = _find_named_size(name)
    if named is not None and named.family.model_type == model_type:
        return named
    check_model_type(model_type, f"model.path = {path}")
    given = None if tokenizer is None or tokenizer.path is None else (tokenizer.path, tokenizer.revision)
    places = [place for place in (given, (path, revision)) if place is not None]
    files = (find_weights_file(place, TOKENIZER_FILE, at) for place, at in places)
    family = read_tokenizer_family(FAMILIES.values(), model_type, files)
    return build_saved_size(name, f"model.path = {path}", found, _get_example(family))


def _find_planned_size(config: Config) -> ModelSize | None:
    """Return the size in the plan of a run that has begun and whose weights are gone, or of `model.init_from`."""
    model = config.model
    plan = read_source_plan(model.init_from) if model.init_from is not None else read_recorded_plan(config)
    family = FAMILIES.get(plan.get("family", ""))
    if family is None or normalize_model_name(plan["model"]) != normalize_model_name(model.name):
        return None
    return build_saved_size(model.name, "plan.json", plan["hf_config"], _get_example(family))


def _raise_unknown_name(model: ModelConfig) -> NoReturn:
    fitting = _list_sizes_of_weights(model)
    if not fitting:
        find_size(model.name)  # raises with the nearest names
    shown = " and ".join(filter(None, [", ".join(fitting[:-1]), fitting[-1]]))
    raise PlanError(
        f"model.name = {model.name}: no known size has this name. Remove it, and the size follows from the weights in "
        f"{model.path}, which have the shape of {shown}"
    )


def _get_example(family: Family) -> ModelSize:
    return next(size for size in SIZES.values() if size.family is family)


def find_tokenizer_family(name: str, has_token: Callable[[str], bool]) -> Family | None:
    """Return the family of a known name, else the one with the most special tokens in the tokenizer, or None."""
    named = _find_named_size(name)
    return named.family if named is not None else choose_family(FAMILIES.values(), has_token)


def _list_sizes_of_weights(model: ModelConfig) -> list[str]:
    """Return the sizes of the shape in the config.json of the weights, the number of embedding rows left out."""
    found = None if model.path is None else read_saved_config(model.path, model.revision)
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

    It has the values of saved weights (`model.init_from`, or a `model.path` that is here), and loaded weights are
    compared with it. The maximum position is at least `data.sequence_length`, except with learned positions (StarCoder
    1). Lists that transformers derives itself (layer_types) are left out. Raises PlanError for an unknown size or an
    impossible shape.
    """
    return build_hf_config(config, find_run_size(config))


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
    # Families of one class of transformers have the same layers.
    return None if lora is None else build_adapter(lora, _BY_TYPE[hf["model_type"]], read_model_dims(hf))


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
