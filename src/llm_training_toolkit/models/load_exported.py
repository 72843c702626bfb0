"""Models loaded from exported directories: whole models, and adapters with their base model.

Directories may come from strangers: code in them is never run, and pickled weights stay closed. Weights that are
missing or surplus are refused by name, because a missing one would be random.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.models.check_weights import LOAD_ERRORS, format_load_error, format_weight_misfit

_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_exported_model(directory: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """Load the model in a directory, as it was trained.

    Raises CheckpointError if it or its base is missing, incomplete, damaged, or needs code of its own.
    """
    if (directory / "config.json").is_file():
        try:
            return _load_whole_model(str(directory)).eval()
        except LOAD_ERRORS as error:
            raise CheckpointError(
                f"{directory}: no model can be loaded from there: {format_load_error(error)}"
            ) from error
    if not (directory / _ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: no model there (neither config.json nor {_ADAPTER_CONFIG}): name an exported "
            "directory, such as "
            "RUN/export"
        )
    from peft import PeftModel  # noqa: PLC0415 - over a second to import

    base: Any = _load_base_model(directory, _read_adapter_dtype(directory / _ADAPTER_WEIGHTS))
    if (directory / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(str(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads activation checkpointing by a deprecated name
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # refused by name below
        # As in training; by default peft computes adapters in fp32.
        try:
            model = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
        except (RuntimeError, TypeError, ValueError) as error:  # layers of other sizes or names
            raise CheckpointError(
                f"{directory}: these adapters do not fit {base.name_or_path}: they belong to another model. Name it in "
                f"{_ADAPTER_CONFIG} (base_model_name_or_path). {_get_first_mismatch(error)}"
            ) from error
    _check_adapters_complete(model, directory)
    return model.eval()


def _load_whole_model(path: str, **options: Any) -> Any:  # noqa: ANN401 - transformers has no types
    """Load the model at a path or hub id. Raises CheckpointError for a misfit, `LOAD_ERRORS` otherwise."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path,
        # Explicit, because without it transformers asks at the terminal whether to run the model's own code.
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `info` has their names, which transformers' own error lacks
        **options,
    )
    if misfit := format_weight_misfit(info):
        raise CheckpointError(f"{path}: the weights do not fit the model: {misfit}")
    return model


def _check_adapters_complete(model: Any, directory: Path) -> None:  # noqa: ANN401 - peft has no types
    """Raise CheckpointError that names adapters which the file lacks, or has beside those of the model."""
    from peft import get_peft_model_state_dict  # noqa: PLC0415 - over a second to import

    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    with safe_open(directory / _ADAPTER_WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    misfit = format_weight_misfit({"missing_keys": wanted - found, "unexpected_keys": found - wanted})
    if misfit:
        raise CheckpointError(f"{directory / _ADAPTER_WEIGHTS}: the adapters do not fit {_ADAPTER_CONFIG}: {misfit}")


def resolve_device(device: str) -> str:
    """Return the device asked for; `auto` = a GPU if there is one. Raises PlanError for a missing GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"--device {device}: torch finds no GPU here")
    return device


def move_to_device(model: Any, device: str | torch.device) -> Any:  # noqa: ANN401 - transformers has no types
    """Move a model to a device; to fp32 on a CPU where bf16 is slower, as `train.precision: auto` decides.

    The weights keep their values, which fp32 holds exactly; sums are rounded less.
    """
    target_device = torch.device(device)
    upcast = target_device.type == "cpu" and model.dtype == torch.bfloat16 and measure_bf16_slowdown(target_device) > 1
    return model.to(target_device, torch.float32) if upcast else model.to(target_device)


def _load_base_model(directory: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    try:
        values = json.loads((directory / _ADAPTER_CONFIG).read_text())
        given, revision = str(values["base_model_name_or_path"]), values.get("revision") or "main"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / _ADAPTER_CONFIG}: names no base model ({error!r})") from error
    try:
        return _load_whole_model(_resolve_base_path(directory, given), dtype=dtype, revision=revision)
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{directory} holds adapters, and the model they belong to is not there: {given}. Bring it back, or name "
            f"it in {_ADAPTER_CONFIG}; adapters merged into their model (ltt export RUN --merge) need none. "
            f"{format_load_error(error)}"
        ) from error


def _get_first_mismatch(error: Exception) -> str:
    """Return the first mismatched layer of torch's list; of other messages the first line."""
    rows = [row.strip() for row in str(error).splitlines()]
    return next((row for row in rows if row.startswith("size mismatch")), rows[0])


def _read_adapter_dtype(file: Path) -> torch.dtype:
    """Return the dtype that adapters were computed in, which their base must use as well. Raises CheckpointError."""
    try:
        with safe_open(file, framework="pt") as tensors:
            dtype: torch.dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    except (OSError, SafetensorError, StopIteration) as error:
        raise CheckpointError(
            f"{file}: no adapters can be read from there ({error}); pickled ones are not opened"
        ) from error
    return dtype


def _resolve_base_path(directory: Path, given: str) -> str:
    """Return the path of the adapters' base weights: as given, or of the same name next to their directory."""
    for candidate in (Path(given).expanduser(), directory.parent / Path(given).name):
        if (candidate / "config.json").is_file():
            return str(candidate)
    return given
