"""Published weights: their configuration for training, and a check that they fit before any of them is loaded.

`check_pretrained_weights` runs before `zero3_init`: under ZeRO-3 transformers 5.23 silently accepts surplus weights,
and an output layer that differs from the embedding it is tied to. On a mismatched shape it hangs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import cached_file

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.families import DROPOUTS

# Raised by transformers for weights that are missing, damaged or of an unknown kind.
LOAD_ERRORS = (OSError, ImportError, RuntimeError, ValueError, SafetensorError)


def resolve_model_path(path: str) -> str:
    """Return `model.path` as transformers takes it: a directory with `~` expanded, or a hub id."""
    local = Path(path).expanduser()
    return str(local) if local.exists() else path


def read_hf_config(path: str, model_type: str | None, revision: str | None = None) -> Any:  # noqa: ANN401
    """Read the configuration of the weights at `path`, dropouts 0. Raises PlanError for another `model_type`.

    `revision` is that of a hub id. Of a vision-language model the configuration is that of the language model, if that
    is of `model_type`.
    """
    path = resolve_model_path(path)
    try:
        # Explicit, because without trust_remote_code transformers asks at the terminal whether to run the code.
        config = AutoConfig.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"model.path = {path}: no weights can be loaded from there: {format_load_error(error)}"
        ) from error
    if model_type is not None and config.get_text_config().model_type == model_type:
        config = _select_text_config(config)
    if model_type is not None and config.model_type != model_type:
        raise PlanError(f"model.path = {path} holds a {config.model_type} model, model.name is of {model_type}")
    config.pad_token_id = None  # it would freeze its embedding row, and padding here is <|endoftext|>
    for name in set(DROPOUTS) & set(config.to_dict()):
        setattr(config, name, 0.0)
    return config


def _select_text_config(config: Any) -> Any:  # noqa: ANN401 - transformers has no types
    """Return the language model's configuration; beside it may stand that its matrices are tied."""
    text = config.get_text_config()
    text.tie_word_embeddings = text.tie_word_embeddings or config.tie_word_embeddings
    return text


def check_pretrained_weights(path: str, model_type: str) -> None:
    """Raise CheckpointError that names weights that are missing, surplus, of another shape or not tied.

    The model is built on the meta device, so that only the headers of the files are read.
    """
    config, path = read_hf_config(path, model_type), resolve_model_path(path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            device_map="meta",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `info` has their names, which transformers' own error lacks
        )
        wrong = {kind: list(names) for kind, names in info.items() if names}
        apart = model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        if model.config.tie_word_embeddings and apart:  # both are in the files: compare their values
            wrong |= _find_untied_weights(path, model)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"model.path = {path}: no weights can be loaded from there: {format_load_error(error)}"
        ) from error
    if misfit := format_weight_misfit(wrong):
        raise CheckpointError(f"model.path = {path}: the weights do not fit the model: {misfit}")


def format_weight_misfit(loading_info: Mapping[str, Iterable[Any]]) -> str | None:
    """Return the weights that are missing, surplus or of another shape, by name, or None if all fit.

    `loading_info`: names by kind, as `from_pretrained` returns them with `output_loading_info`.
    """
    wrong = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
    listed = (f"{kind}: {', '.join(names[:3])} ({len(names)} in all)" for kind, names in wrong.items())
    return "; ".join(listed) or None


def _find_untied_weights(path: str, model: Any) -> dict[str, list[str]]:  # noqa: ANN401 - transformers has no types
    modules = {id(module): name for name, module in model.named_modules()}
    names = [f"{modules[id(layer)]}.weight" for layer in (model.get_input_embeddings(), model.get_output_embeddings())]
    embedding, output = (_read_tensor(path, name) for name in names)
    return {} if torch.equal(embedding, output) else {"tied by config.json, but different": names}


def _read_tensor(path: str, name: str) -> torch.Tensor:
    """Read one tensor of the weights in a directory or under a hub id."""
    file = "model.safetensors"
    within = name.replace("model.", "model.language_model.", 1)  # its name in a vision-language model
    index = cached_file(path, f"{file}.index.json", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        with open(index, encoding="utf-8") as stream:  # noqa: PTH123 - transformers gives a text
            files = json.load(stream)["weight_map"]
        file = files.get(name) or files[within]
    with safe_open(cached_file(path, file), framework="pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(within if within in opened.keys() else name)  # noqa: SIM118
    return tensor


def format_load_error(error: Exception) -> str:
    """Return the cause for a person: code that came with weights is named, and never run."""
    if "trust_remote_code" in str(error):
        return (
            "its classes are code in its own repository, which is never run here: use weights that transformers knows"
        )
    return str(error)
