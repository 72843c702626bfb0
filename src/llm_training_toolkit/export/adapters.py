"""Export of adapters in peft's format, or merged into their base weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.export.directory import ModelFiles, write_model_files
from llm_training_toolkit.export.verify import compare_logits, compute_logits
from llm_training_toolkit.export.weights import load_stored_weights, read_stored_parameter, unfuse_experts
from llm_training_toolkit.families import AdapterSpec
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.load_exported import load_exported_model
from llm_training_toolkit.models.lora import (
    ADAPTER_NAME,
    add_adapters,
    build_lora_config,
    compute_expert_delta,
    find_lora_layers,
    name_expert_adapter,
)

# Largest change of a logit by merging, as a share of the largest logit. The one additional rounding of the sum to bf16
# moved logits of small models by 0.6 to 1.5 % with 2 layers and by 3.3 % with 48; in fp32 it was 1e-6.
_MERGE_TOLERANCE = {"bf16": 0.1, "fp32": 1e-4}
# Rounding may send a token of a mixture to another expert, which changes its logits by 13 and 30 % of the largest in
# small models. So only gross errors show in logits; the merged weights are compared strictly by themselves.
_MIXTURE_MERGE_TOLERANCE = _MERGE_TOLERANCE | {"bf16": 1.0}
# Largest deviation of a merged weight from peft's, as a share of the sum of all magnitudes added. Both round to bf16,
# peft also adapters and sums. Measured with 512 x 512 matrices: at most 2^-6.0 (DoRA) if merged, at least
# 2^-2.5 if not.
_MERGE_ROUNDING = 2.0**-5
_MODULES_TO_SAVE = f".modules_to_save.{ADAPTER_NAME}"


@dataclass(frozen=True)
class AdapterBase:
    """Base model as exported adapters name it."""

    path: str
    """Directory or hub id."""
    commit: str | None
    """Commit of a hub id, or None."""


def write_adapters(
    checkpoint: CheckpointReader,
    directory: Path,
    adapter: AdapterSpec,
    *,
    base: AdapterBase,
    precision: str,
    beside: ModelFiles,
) -> None:
    """Write adapters in peft's format, rounded once to `precision`, to an existing directory; `base` verbatim."""
    tensors = {
        _get_peft_name(name): read_stored_parameter(checkpoint, name).to(DTYPES[precision])
        for name in checkpoint.manifest.shapes
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = build_lora_config(adapter, base.path)
    config.revision = base.commit
    config.inference_mode = True
    config.save_pretrained(str(directory))
    write_model_files(directory, beside)


def get_merge_tolerance(hf_config: Mapping[str, Any], precision: str) -> float:
    """Return the largest change of a logit by merging, as a share of the largest logit.

    The configuration may be one saved by transformers, which renames the number of experts of some classes.
    """
    is_mixture = families.read_model_dims(hf_config).experts > 0
    return (_MIXTURE_MERGE_TOLERANCE if is_mixture else _MERGE_TOLERANCE)[precision]


def _get_peft_name(name: str) -> str:
    """Return the name in peft's files: no adapter name, below the two modules that peft wraps around a model."""
    plain = name.replace(_MODULES_TO_SAVE, "").replace(
        f".lora_magnitude_vector.{ADAPTER_NAME}.weight", ".lora_magnitude_vector"
    )
    return f"base_model.model.{plain.replace(f'.{ADAPTER_NAME}.', '.')}"


def check_adapters(
    directory: Path,
    checkpoint: CheckpointReader,
    adapter: AdapterSpec,
    *,
    base: str,
    hf_config: Mapping[str, Any],
    precision: str,
    tolerance: float,
) -> float:
    """Return how far the logits of exported adapters, or of the merged model, deviate; see `compare_logits`.

    Adapters may change logits by less than rounding does, so merged weights are compared with peft's merge.
    """
    model = build_model(hf_config, precision=precision, attention="sdpa", path=base).eval()
    add_adapters(model, adapter, seed=0, dtype=DTYPES[precision])
    load_stored_weights(model, checkpoint)
    wanted = compute_logits(model)
    _check_merged_weights(model, directory)
    del model
    return compare_logits(directory, compute_logits(load_exported_model(directory)), wanted, tolerance)


@torch.no_grad()
def _check_merged_weights(model: nn.Module, directory: Path) -> None:
    """Merge `model` with peft. Raises CheckpointError if adapted matrices in `directory` differ from it."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in directory.glob("*.safetensors")]
        files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - no mapping
        for name, layer in find_lora_layers(model).items():
            merged, added = _merge_layer(layer)
            parameter = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
            limits = unfuse_experts(parameter, _MERGE_ROUNDING * added)
            for tensor, wanted in unfuse_experts(parameter, merged).items():
                if tensor not in files:
                    continue  # these are adapters, not a merged model
                if bool(((files[tensor].get_tensor(tensor).float() - wanted).abs() > limits[tensor]).any()):
                    raise CheckpointError(
                        f"export to {directory}: {tensor} is not what its adapter makes of it; nothing was exported"
                    )


def _merge_layer(layer: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - peft's layers have one class for each kind of base
    """Merge a layer with peft; return its weight and the sum of all magnitudes that were added for it."""
    kind = getattr(layer, "parameter_name", "weight")
    base = getattr(layer.get_base_layer(), kind).to(torch.float32, copy=True)
    layer.merge()
    wanted = getattr(layer.get_base_layer(), kind).float()
    first, second = (half[ADAPTER_NAME].weight.float().abs() for half in (layer.lora_A, layer.lora_B))
    product = compute_expert_delta(first, second, len(base)) if base.ndim > 2 else second @ first
    return wanted, base.abs() + (wanted - base).abs() + layer.scaling[ADAPTER_NAME] * product


class MergedWeights:
    """Parameters of a model with a checkpoint's adapters merged into it, in fp32."""

    def __init__(self, model: nn.Module, checkpoint: CheckpointReader, adapter: AdapterSpec) -> None:
        """`model` is the base without adapters, and stays as it is."""
        self._parameters = dict(model.named_parameters())
        self._checkpoint, self._adapter = checkpoint, adapter
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(parameter.shape) for name, parameter in self._parameters.items()
        }

    def get_tensor(self, name: str) -> Tensor:
        """Return the full parameter."""
        module = name.removesuffix(".weight")
        held = self._checkpoint.manifest.shapes
        if f"{module}{_MODULES_TO_SAVE}.weight" in held:
            return read_stored_parameter(self._checkpoint, f"{module}{_MODULES_TO_SAVE}.weight")
        base = self._parameters[name].detach().float()
        of_experts = name_expert_adapter(name, self._adapter)
        module = of_experts or module
        if f"{module}.lora_A.{ADAPTER_NAME}.weight" not in held:
            return base
        first, second = (
            read_stored_parameter(self._checkpoint, f"{module}.lora_{half}.{ADAPTER_NAME}.weight") for half in "AB"
        )
        product = compute_expert_delta(first, second, len(base)) if of_experts else second @ first
        merged = base + self._adapter.scaling * product
        if self._adapter.dora:
            length = read_stored_parameter(self._checkpoint, f"{module}.lora_magnitude_vector.{ADAPTER_NAME}.weight")
            merged *= (length / torch.linalg.norm(merged, dim=1))[:, None]
        return merged
