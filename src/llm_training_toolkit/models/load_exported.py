"""Models loaded from exported directories: whole models, and adapters with their base model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from llm_training_toolkit.distributed.matmul_speed import measure_bf16_slowdown
from llm_training_toolkit.errors import CheckpointError, PlanError

_ADAPTER_CONFIG = "adapter_config.json"


def load_exported_model(directory: Path) -> Any:  # noqa: ANN401 - transformers has no types
    """Load the model in a directory, as it was trained. Raises CheckpointError if it or its base is missing."""
    if (directory / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(str(directory)).eval()
    if not (directory / _ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: no model there (neither config.json nor {_ADAPTER_CONFIG}): name an exported "
            "directory, such as "
            "RUN/export"
        )
    from peft import PeftModel  # noqa: PLC0415 - over a second to import

    base: Any = _load_base_model(directory, _read_adapter_dtype(directory / "adapter_model.safetensors"))
    if (directory / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(str(directory))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads activation checkpointing by a deprecated name
        # As in training; by default peft computes adapters in fp32.
        try:
            model = PeftModel.from_pretrained(base, str(directory), autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as error:  # layers of other sizes or names
            raise CheckpointError(
                f"{directory}: these adapters do not fit {base.name_or_path}: they belong to another model. Name it in "
                f"{_ADAPTER_CONFIG} (base_model_name_or_path). {_get_first_mismatch(error)}"
            ) from error
    return model.eval()


def resolve_device(asked: str) -> str:
    """Return the device asked for; `auto` = a GPU if there is one. Raises PlanError for a missing GPU."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise PlanError(f"--device {asked}: torch finds no GPU here")
    return asked


def move_to_device(model: Any, device: str | torch.device) -> Any:  # noqa: ANN401 - transformers has no types
    """Move a model to a device; to fp32 on a CPU where bf16 is slower, as `train.precision: auto` decides.

    The weights keep their values, which fp32 holds exactly; sums are rounded less.
    """
    place = torch.device(device)
    upcast = place.type == "cpu" and model.dtype == torch.bfloat16 and measure_bf16_slowdown(place) > 1
    return model.to(place, torch.float32) if upcast else model.to(place)


def _load_base_model(directory: Path, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers has no types
    given = str(json.loads((directory / _ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    try:
        return AutoModelForCausalLM.from_pretrained(_resolve_base_path(directory, given), dtype=dtype)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory} holds adapters, and the model they belong to is not there: {given}. Bring it back, or name "
            f"it in {_ADAPTER_CONFIG}; adapters merged into their model (ltt export RUN --merge) need none. {error}"
        ) from error


def _get_first_mismatch(error: Exception) -> str:
    """Return the first mismatched layer of torch's list; of other messages the first line."""
    rows = [row.strip() for row in str(error).splitlines()]
    return next((row for row in rows if row.startswith("size mismatch")), rows[0])


def _read_adapter_dtype(file: Path) -> torch.dtype:
    """Return the dtype that adapters were computed in, which their base must use as well."""
    with safe_open(file, framework="pt") as tensors:
        dtype: torch.dtype = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    return dtype


def _resolve_base_path(directory: Path, given: str) -> str:
    """Return the path of the adapters' base weights: as given, or of the same name next to their directory."""
    for place in (Path(given).expanduser(), directory.parent / Path(given).name):
        if (place / "config.json").is_file():
            return str(place)
    return given
