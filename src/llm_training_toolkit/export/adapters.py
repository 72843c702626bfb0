"""Adapters as peft's directory, and merged into the weights they stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_training_toolkit.checkpoint import Checkpoint
from llm_training_toolkit.export.check import compare, logits
from llm_training_toolkit.export.directory import Beside, write_beside
from llm_training_toolkit.export.weights import stored
from llm_training_toolkit.families import Adapter
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.adapters import NAME, add_adapters, lora_config
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.exported import open_exported

MERGE_TOLERANCE = {"bf16": 0.1, "fp32": 1e-4}
"""Largest difference of a logit that merging may make, as a share of the largest one. Rounding the sum to bf16 once
more moved logits of small models by 0.6 to 1.5 % with 2 layers and by 3.3 % with 48; in fp32 it was 1e-6."""
_WHOLE = f".modules_to_save.{NAME}"


def write_adapters(
    checkpoint: Checkpoint, directory: Path, adapter: Adapter, *, base: str, precision: str, beside: Beside
) -> None:
    """Write adapters as peft does into a directory that exists, rounded once to `precision`; `base` goes as given."""
    tensors = {_peft_name(name): stored(checkpoint, name).to(DTYPES[precision]) for name in checkpoint.manifest.shapes}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = lora_config(adapter, base)
    config.inference_mode = True
    config.save_pretrained(str(directory))
    write_beside(directory, beside)


def _peft_name(name: str) -> str:
    """What peft's files call a parameter: without the adapter's name, below the two modules peft wraps a model in."""
    plain = name.replace(_WHOLE, "").replace(f".lora_magnitude_vector.{NAME}.weight", ".lora_magnitude_vector")
    return f"base_model.model.{plain.replace(f'.{NAME}.', '.')}"


def load_adapters(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Write the trained parameters of a checkpoint into a model that has adapters beside its layers."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in checkpoint.manifest.shapes:
            parameters[name].copy_(stored(checkpoint, name))


def check_adapters(
    directory: Path,
    checkpoint: Checkpoint,
    adapter: Adapter,
    *,
    base: str,
    hf_config: Mapping[str, Any],
    precision: str,
    tolerance: float,
) -> float:
    """How far the logits of adapters, or of what they were merged into, are from the checkpoint's; see `compare`."""
    model = build_model(hf_config, precision=precision, attention="sdpa", path=base).eval()
    add_adapters(model, adapter, seed=0, dtype=DTYPES[precision])
    load_adapters(model, checkpoint)
    wanted = logits(model)
    del model
    return compare(directory, logits(open_exported(directory)), wanted, tolerance)


class MergedWeights:
    """The parameters of a model with a checkpoint's adapters merged into it, in fp32."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, adapter: Adapter) -> None:
        """`model` is the base without adapters; it is read and stays as it is."""
        self._parameters = dict(model.named_parameters())
        self._checkpoint, self._adapter = checkpoint, adapter
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._parameters.items()
        }

    def tensor(self, name: str) -> Tensor:
        """A parameter, whole."""
        module = name.removesuffix(".weight")
        held = self._checkpoint.manifest.shapes
        if f"{module}{_WHOLE}.weight" in held:
            return stored(self._checkpoint, f"{module}{_WHOLE}.weight")
        base = self._parameters[name].detach().float()
        if f"{module}.lora_A.{NAME}.weight" not in held:
            return base
        first, second = (stored(self._checkpoint, f"{module}.lora_{half}.{NAME}.weight") for half in "AB")
        merged = base + self._adapter.scaling * (second @ first)
        if self._adapter.dora:
            length = stored(self._checkpoint, f"{module}.lora_magnitude_vector.{NAME}.weight")
            merged *= (length / torch.linalg.norm(merged, dim=1))[:, None]
        return merged
