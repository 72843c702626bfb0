"""Hugging Face configuration of a run's model: the size's, with `model.config_overrides`, checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.model_config import ModelConfig
from llm_training_toolkit.config.run_identity import normalize_model_name
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families.family import DROPOUTS, Family, ModelDims, ModelSize
from llm_training_toolkit.families.saved_config import is_hub_id, read_json_object, read_saved_config

# Among a plan's estimated values: the hub was silent, and weights of a known name may have other dimensions.
ASSUMED_DIMENSIONS = "hf_config"
# Refused in `model.config_overrides`: a nested value (use rope_theta), and values that would break a guarantee.
_FIXED = {"rope_parameters", "use_sliding_window", *DROPOUTS}
# Matrix products are fastest with dimensions in multiples of 64 (NVIDIA, Matrix Multiplication Background).
_VOCABULARY_MULTIPLE = 64
_PUBLISHED_INTERVAL = 4  # layers to one with attention in a hybrid model


def list_shape_keys(size: ModelSize) -> tuple[str, ...]:
    """Return the sorted keys that `model.config_overrides` may have for this size."""
    values = size.hf_values
    keys = (set(values) - _FIXED - size.family.fixed) | set(size.family.aliases)
    return tuple(sorted(keys | {"rope_theta"} if "rope_parameters" in values else keys))


def build_hf_config(config: Config, size: ModelSize) -> dict[str, Any]:
    """Return the complete Hugging Face configuration of a run. Raises PlanError with all its problems."""
    begun = _read_recorded_values(config)
    saved = read_saved_values(config.model, size) if begun is None else select_size_values(size, begun)
    values, problems = (saved, []) if saved is not None else _apply_shape(size, config.model.config_overrides)
    if not problems:
        rows = values["vocab_size"] if saved is not None else compute_vocab_size(config, size)
        values["vocab_size"] = _get_resized_vocab_size(config.model, rows) if begun is None else rows
        problems = _find_mismatches(size.family, values) + _find_vocabulary_problems(config, values["vocab_size"])
    if problems:
        raise PlanError("\n".join(f"model.config_overrides of {size.name}: {problem}" for problem in problems))
    return _complete_hf_config(size.family, values, config.data.sequence_length)


def read_saved_values(model: ModelConfig, size: ModelSize) -> dict[str, Any] | None:
    """Read the size's values from saved weights: those of `path` as far as they are here, or of a run in `init_from`.

    Returns None from scratch and for a hub id that is not in the cache, which has the values of the named size. Raises
    PlanError if the saved configuration cannot be read or is of another family.
    """
    if model.path is not None:
        where, found = f"model.path = {model.path}", read_saved_config(model.path, model.revision)
    elif model.init_from is not None:
        where, found = f"model.init_from = {model.init_from}", read_source_plan(model.init_from).get("hf_config", {})
    else:
        found = None
    if found is None:
        return None
    if found.get("model_type") != size.family.model_type:
        raise PlanError(
            f"{where} holds a {found.get('model_type')} model, and model.name = {size.name} is of "
            f"{size.family.model_type}: correct one of them"
        )
    if (problem := find_window_problem(size, found)) is not None:
        raise PlanError(f"{where}, config.json: {problem}")
    return select_size_values(size, found)


def read_source_plan(init_from: str) -> dict[str, Any]:
    """Read the plan of the run in `model.init_from`. Raises PlanError."""
    return read_json_object(f"model.init_from = {init_from}", Path(init_from).expanduser() / "plan.json")


def select_size_values(size: ModelSize, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size's values, except dropouts, as in another configuration of its family.

    The kinds of layers are added where a hybrid model has other ones than the published ones.
    """
    values = normalize_saved_values(size.family, found)
    selected = {key: value if key in DROPOUTS else values.get(key, value) for key, value in size.hf_values.items()}
    return {**selected, **_find_other_layer_types(size.family, found)}


def find_window_problem(size: ModelSize, found: Mapping[str, Any]) -> str | None:
    """Return the problem of a sliding window where the family's sizes have none; None without one.

    Only the switch would be kept, and transformers' default window, 4096, would replace the saved one.
    """
    if not found.get("use_sliding_window") or "sliding_window" in size.hf_values:
        return None
    return (
        f"use_sliding_window = {found['use_sliding_window']} is not supported: {size.family.name} attends to all tokens"
    )


def normalize_saved_values(family: Family, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved configuration with the names of the family's values, also if transformers 4 saved it."""
    renamed = {key: found[name] for key, name in family.saved_as.items() if name in found}
    return {**_convert_rotary_values(found), **renamed, **found}


def _convert_rotary_values(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary values of a configuration by transformers 4 in the form of transformers 5. Raises PlanError."""
    if "rope_theta" not in found:
        return {}
    scaling = found.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise PlanError(f'config.json: rope_scaling = {scaling!r} must be an object, such as {{"rope_type": "yarn"}}')
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    partial = {key: found[key] for key in ("partial_rotary_factor",) if key in found}
    return {"rope_parameters": {**partial, **scaling, "rope_type": kind, "rope_theta": found["rope_theta"]}}


def _find_other_layer_types(family: Family, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kinds of a hybrid model's layers if attention is not, as published, in each fourth."""
    if "linear_conv_kernel_dim" not in family.defaults:
        return {}
    count, every = found.get("num_hidden_layers", 0), found.get("full_attention_interval", _PUBLISHED_INTERVAL)
    types = found.get("layer_types") or _list_layer_types(count, every)
    return {} if types == _list_layer_types(count, _PUBLISHED_INTERVAL) else {"layer_types": types}


def _list_layer_types(count: int, every: int) -> list[str]:
    return ["linear_attention" if number % every else "full_attention" for number in range(1, count + 1)]


def _read_recorded_values(config: Config) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = read_recorded_plan(config).get("hf_config")
    return found


def read_recorded_plan(config: Config) -> Mapping[str, Any]:
    """Read the run's plan if its initial weights no longer exist; a resume does not need them.

    Empty if they exist, for a run that has not started, for one that would now start from other weights, and for a plan
    of assumed dimensions.
    """
    given = config.model.path or config.model.init_from
    if given is None or Path(given).expanduser().exists():
        return {}
    if config.begun_plan:
        return config.begun_plan
    found = recall_plan(config, Path(config.run.dir).expanduser() / config.run.name).begun_plan
    return {} if is_plan_assumed(found) else found


def is_plan_assumed(plan: Mapping[str, Any]) -> bool:
    """Return whether a recorded plan has its dimensions by name, as the hub was silent: the next start asks again."""
    return ASSUMED_DIMENSIONS in plan.get("estimated", ())


def are_dimensions_assumed(config: Config) -> bool:
    """Return whether the dimensions of the hub's weights follow from their name alone, which other ones may have."""
    model = config.model
    if model.path is None or not is_hub_id(model.path):
        return False
    recorded = read_recorded_plan(config)
    return is_plan_assumed(recorded) if recorded else read_saved_config(model.path, model.revision) is None


def recall_plan(config: Config, run: Path) -> Config:
    """Return the configuration with the plan in the run's directory on this machine: a mirror, or a moved run."""
    return recall_plan_files(config, lambda name: (run / name).read_bytes())


def recall_plan_files(config: Config, read_file: Callable[[str], bytes]) -> Config:
    """Return the configuration with the plan among its run's files, if it began with the same weights.

    `read_file` gives a file by its name in the run's directory, or raises OSError.
    """
    try:
        resolved, plan = (json.loads(read_file(name)) for name in ("resolved.json", "plan.json"))
    except (OSError, ValueError):
        return config
    begun, model = resolved["model"], config.model
    same_name = normalize_model_name(str(begun.get("name"))) == normalize_model_name(model.name)
    keys = ("path", "revision", "init_from", "resize_vocab_to")
    same = same_name and all(begun.get(key) == getattr(model, key) for key in keys)
    return config.with_begun_plan(plan) if same else config


def compute_vocab_size(config: Config, size: ModelSize) -> int:
    """Return the embedding rows: the override's, else the trained tokenizer's rounded up to 64s, else the size's."""
    if "vocab_size" in config.model.config_overrides:
        return int(config.model.config_overrides["vocab_size"])
    if config.tokenizer.train is not None:
        return -(-config.tokenizer.train.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    return int(size.hf_values["vocab_size"])


def _apply_shape(size: ModelSize, shape: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the size's values with the overrides applied, and the problems of the overrides."""
    values = size.hf_values
    valid = list_shape_keys(size)
    problems: list[str] = []
    seen: set[str] = set()
    for given, value in shape.items():
        key = size.family.aliases.get(given, given)
        if given not in valid:
            problems.append(f"{given} is not a key of this size. Valid: {', '.join(valid)}")
        elif key in seen:
            problems.append(f"{given} and another key both set {key}: keep one")
        elif (wrong := find_value_problem(given, value, _get_value(values, key))) is not None:
            problems.append(wrong)
        else:
            _set_value(values, key, value)
        seen.add(key)
    return values, problems


def _get_value(values: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401 - a value of JSON
    return values["rope_parameters"]["rope_theta"] if key == "rope_theta" else values[key]


def _set_value(values: dict[str, Any], key: str, value: Any) -> None:  # noqa: ANN401 - a value of JSON
    if key == "rope_theta":
        values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": float(value)}
    else:
        values[key] = value


def find_value_problem(key: str, value: Any, current: Any) -> str | None:  # noqa: ANN401 - values of JSON
    """Return the problem of a value, by the type of the value it replaces."""
    kind = type(current)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = number if kind is float else type(value) is kind
    if not fits:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        return f"{key} = {value!r} must be {names[kind]}, such as {current!r}"
    return f"{key} = {value!r} must be above zero" if number and value <= 0 else None


def _find_mismatches(family: Family, values: Mapping[str, Any]) -> list[str]:
    """Return problems of dimensions that do not divide each other."""
    dims = family.read_dims(values)
    if family.derived_head_dim and dims.hidden % dims.heads:
        return [f"hidden size {dims.hidden} is not divisible by {dims.heads} attention heads"]
    return _find_head_mismatches(dims)


def _find_head_mismatches(dims: ModelDims) -> list[str]:
    problems = []
    if dims.heads % dims.kv_heads:
        problems.append(f"{dims.heads} attention heads are not divisible by {dims.kv_heads} key-value heads")
    linear = dims.linear_attention
    if linear is not None and linear.value_heads % linear.key_heads:
        what = f"{linear.value_heads} value heads of linear attention are not divisible by {linear.key_heads} key heads"
        problems.append(what)
    if dims.experts_per_token > dims.experts:
        problems.append(f"a token cannot pass {dims.experts_per_token} of {dims.experts} experts")
    if dims.head_dim % 2 and not dims.positions:
        problems.append(f"head_dim {dims.head_dim} is odd: rotary positions turn pairs, so it must be even")
    return problems


def _get_resized_vocab_size(model: ModelConfig, rows: int) -> int:
    """Return the embedding rows after `model.resize_vocab_to`."""
    wanted = model.resize_vocab_to
    if wanted is not None and wanted <= rows:
        raise PlanError(
            f"model.resize_vocab_to = {wanted}: the weights have {rows} rows, and none is removed: remove it"
        )
    return wanted or rows


def _find_vocabulary_problems(config: Config, rows: int) -> list[str]:
    trained = config.tokenizer.train
    if trained is None or trained.vocab_size <= rows:
        return []
    return [f"vocab_size {rows} is below tokenizer.train.vocab_size {trained.vocab_size}: leave it out, or raise it"]


def _complete_hf_config(family: Family, values: dict[str, Any], sequence_length: int) -> dict[str, Any]:
    """Add what is not shape: class, positions for the sequence, and switches that must be off in training."""
    if not family.absolute_positions:
        values[family.position_key] = max(values[family.position_key], sequence_length)
    return {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        **values,
        "use_cache": False,
        # Ids belong to the tokenizer. Omitted, two families would default to 50256, beyond a small vocabulary. A
        # padding id would freeze its embedding row, which is <|endoftext|> for Qwen and StarCoder.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
