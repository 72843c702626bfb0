"""Configuration saved beside weights: in a directory, or fetched from the hub into its cache."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.model_config import ModelConfig
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families.family import DROPOUTS, ModelSize

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Return whether weights may be on the hub: an id has at most one slash, and no directory has its name."""
    return not Path(path).expanduser().is_dir() and _HUB_ID.fullmatch(path) is not None


def find_weights_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Return a file of a directory or of a hub id's cached revision, or None if it is not on this machine."""
    if not is_hub_id(path):
        file = Path(path).expanduser() / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def read_saved_config(path: str, revision: str | None = None) -> dict[str, Any] | None:
    """Read the configuration of the language model of weights in a directory, or in the cache of the hub.

    None if it is not on this machine. `revision` is that of a hub id. Raises PlanError for a file without a model.
    """
    file = find_weights_file(path, CONFIG_FILE, revision)
    return None if file is None else _select_text_config(read_json_object(f"model.path = {path}", file))


def read_saved_dropout(model: ModelConfig, size: ModelSize) -> float:
    """Return the largest dropout in the configuration of the weights at `path`, as far as it is readable here."""
    found = read_saved_config(model.path, model.revision) if model.path is not None else {}
    if found is None:
        return size.family.published_dropout
    return max(float(found.get(name, 0.0)) for name in DROPOUTS)


def read_saved_dtype(found: Mapping[str, Any]) -> str | None:
    """Return the data type of weights, such as `float16`, as transformers 5 or 4 saved it in their configuration."""
    dtype = found.get("dtype") or found.get("torch_dtype")
    return dtype.removeprefix("torch.") if isinstance(dtype, str) else None


def read_quantization(found: Mapping[str, Any]) -> str | None:
    """Return the method of quantized weights, such as `fp8` or `gptq`, or None."""
    quantization = found.get("quantization_config")
    return str(quantization.get("quant_method", "unknown")) if isinstance(quantization, dict) else None


def _select_text_config(found: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a vision-language configuration, any other configuration as it is."""
    text = found.get("text_config")
    if not isinstance(text, dict):
        return found
    whole = {key: found[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in found}
    tied = any(part.get("tie_word_embeddings", False) for part in (found, text))
    return {**whole, **text, "tie_word_embeddings": tied}


def read_json_object(where: str, file: Path) -> dict[str, Any]:
    """Read the description of a model or a run. Raises PlanError."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{where}: {file} cannot be read ({error}): name a saved model, or a run's directory"
        ) from error
    if not isinstance(found, dict):
        raise PlanError(f"{where}: {file} is not the description of a model")
    return found
