"""Writes full models as sharded safetensors, reading one parameter at a time.

So no process holds a model more than once, whatever ZeRO stage and number of workers wrote the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.export.directory import ModelFiles, write_model_files
from llm_training_toolkit.models.build import DTYPES

_SHARD_BYTES = 5_000_000_000


class WeightSource(Protocol):
    """Parameters of a model, read one at a time; tied ones once."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    def get_tensor(self, name: str) -> Tensor: ...


class CheckpointWeights:
    """Parameters in the checkpoint of a fully trained model, in fp32."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self._checkpoint = checkpoint
        self.shapes = checkpoint.manifest.shapes

    def get_tensor(self, name: str) -> Tensor:
        """Return the full parameter."""
        return read_stored_parameter(self._checkpoint, name)


class ModelWeights:
    """Parameters of a model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def get_tensor(self, name: str) -> Tensor:
        """Return the full parameter."""
        return self._parameters[name].detach()


def read_stored_parameter(checkpoint: CheckpointReader, name: str) -> Tensor:
    """Read a full parameter from a checkpoint, in fp32."""
    shape = checkpoint.manifest.shapes[name]
    return torch.from_numpy(checkpoint.read(name, "weights", 0, torch.Size(shape).numel())).reshape(shape)


@torch.no_grad()
def load_stored_weights(model: nn.Module, checkpoint: CheckpointReader) -> None:
    """Copy a checkpoint's trained parameters into a model, in the model's precision."""
    parameters = dict(model.named_parameters())
    for name in checkpoint.manifest.shapes:
        parameters[name].copy_(read_stored_parameter(checkpoint, name))


def write_model(
    weights: WeightSource, directory: Path, *, hf_config: Mapping[str, Any], precision: str, beside: ModelFiles
) -> None:
    """Write a full model to an existing directory: weights, configuration and `beside`.

    Weights are rounded once to `precision`, so they are bit-identical to those of the forward pass. Names are those of
    the published weights.
    """
    _write_weights(weights, directory, DTYPES[precision])
    _write_configuration(directory, hf_config, precision, beside)
    write_model_files(directory, beside)


def _write_weights(weights: WeightSource, directory: Path, dtype: torch.dtype) -> None:
    shards = list(_group_into_shards(weights.shapes, dtype.itemsize))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= unfuse_experts(name, weights.get_tensor(name).to(dtype))
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = sum(torch.Size(shape).numel() for shape in weights.shapes.values()) * dtype.itemsize
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))


def unfuse_experts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a parameter under published names, with separate matrices per expert of a mixture.

    transformers fuses the experts into one tensor per layer when loading; inference engines expect them separate.
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


def _group_into_shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> Iterator[list[str]]:
    """Yield groups of parameter names of at most 5 GB."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = torch.Size(shape).numel() * itemsize
        if names and size + more > _SHARD_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += more
    yield names


def _write_configuration(directory: Path, hf_config: Mapping[str, Any], precision: str, beside: ModelFiles) -> None:
    values = {
        key: value for key, value in hf_config.items() if key not in {"use_cache", "dtype", "transformers_version"}
    }
    config = AutoConfig.for_model(**values)
    config.dtype = DTYPES[precision]
    config.eos_token_id, config.pad_token_id = next(iter(beside.stop_token_ids.values())), beside.pad
    config.bos_token_id = None
    config.save_pretrained(directory)
