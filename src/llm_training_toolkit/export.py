"""Export: a checkpoint as a directory that plain `transformers` loads.

Reads the fragments parameter by parameter, so no process ever needs the model twice, whatever ZeRO
stage and number of workers wrote them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig

from llm_training_toolkit.checkpoint import Checkpoint
from llm_training_toolkit.data.tokenizer import TOKENIZER_FILES
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.models.build import DTYPES

_ORIGIN = "training.json"
_SHARD_BYTES = 5_000_000_000


def export(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    hf_config: Mapping[str, Any],
    tokenizer: Path,
    precision: str,
    ends: Mapping[str, int],
    pad: int,
    card: str,
) -> Path:
    """Write weights, configuration, tokenizer and model card to `destination`, which appears complete or not at all.

    The weights are the fp32 ones rounded once to `precision`: bit for bit those of the forward pass, under the names
    that are published. `ends` are the special tokens, with their ids, that generation stops at; of several the first
    ends an answer, and becomes the tokenizer's end: a model trained on chat never writes the end of text.
    """
    temporary = destination.with_name(f".{destination.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_weights(checkpoint, temporary, DTYPES[precision])
        _write_configuration(temporary, hf_config, precision, tuple(ends.values()), pad)
        _write_tokenizer(tokenizer, temporary, next(iter(ends)) if len(ends) > 1 else None)
        (temporary / "README.md").write_text(card)
        (temporary / _ORIGIN).write_text(json.dumps({"checkpoint": checkpoint.directory.name}))
        if destination.exists():
            shutil.rmtree(destination)
        temporary.rename(destination)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"export to {destination} failed: {error}. The checkpoint is untouched: free some space and start again"
        ) from error
    return destination


def exported_from(directory: Path) -> str | None:
    """Name of the checkpoint an export was made of; None where there is no export."""
    try:
        return str(json.loads((directory / _ORIGIN).read_text())["checkpoint"])
    except (OSError, ValueError, KeyError):
        return None


def _write_weights(checkpoint: Checkpoint, directory: Path, dtype: torch.dtype) -> None:
    shards = list(_shards(checkpoint, dtype.itemsize))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        for parameter in names:
            tensors |= _published(parameter, _tensor(checkpoint, parameter, dtype))
        save_file(tensors, directory / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        sizes = checkpoint.manifest.shapes
        total = sum(torch.Size(shape).numel() for shape in sizes.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))


def _published(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A parameter under the names of published weights: those of a mixture have matrices of their own for each expert.

    transformers fuses them into one tensor a layer when it loads them; inference engines expect them apart.
    """
    prefix, fused, kind = name.rpartition(".experts.")
    if not fused:
        return {name: tensor}
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[kind]
    return {
        f"{prefix}.experts.{number}.{part}.weight": matrix.clone()
        for number, expert in enumerate(tensor)
        for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True)
    }


def _tensor(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    shape = checkpoint.manifest.shapes[name]
    values = checkpoint.read(name, "weights", 0, torch.Size(shape).numel())
    return torch.from_numpy(values).reshape(shape).to(dtype)


def _shards(checkpoint: Checkpoint, itemsize: int) -> Iterator[list[str]]:
    """Names of parameters, in groups of at most 5 GB."""
    names: list[str] = []
    size = 0
    for name, shape in checkpoint.manifest.shapes.items():
        more = torch.Size(shape).numel() * itemsize
        if names and size + more > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_configuration(
    directory: Path, hf_config: Mapping[str, Any], precision: str, ends: tuple[int, ...], pad: int
) -> None:
    values = {
        key: value for key, value in hf_config.items() if key not in {"use_cache", "dtype", "transformers_version"}
    }
    config = AutoConfig.for_model(**values)
    config.dtype = DTYPES[precision]
    config.eos_token_id, config.pad_token_id, config.bos_token_id = ends[0], pad, None
    config.save_pretrained(directory)
    stops = ends[0] if len(ends) == 1 else list(ends)
    GenerationConfig(eos_token_id=stops, pad_token_id=pad).save_pretrained(directory)


def _write_tokenizer(source: Path, directory: Path, end: str | None) -> None:
    """Copy the tokenizer; `end` becomes its end, if there is one."""
    for name in TOKENIZER_FILES:
        if not (source / name).is_file():
            continue
        shutil.copyfile(source / name, directory / name)
        if end is not None and name in {"tokenizer_config.json", "special_tokens_map.json"}:
            values = json.loads((source / name).read_text(encoding="utf-8")) | {"eos_token": end}
            (directory / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
