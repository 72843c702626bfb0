"""LoRA adapters of a model: their layers and parameter counts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.families.family import Family, ModelDims

# Input of a linear layer: the norm before attention, the output of the heads, the norm before the feed-forward layer,
# or the product within it.
Reads = Literal["attention", "heads", "feed_forward", "product"]
MixerKind = Literal["attention", "linear_attention"]


class LinearLayer(NamedTuple):
    """Linear layer within a decoder layer."""

    reads: Reads
    inputs: int
    outputs: int
    layers: int
    """Decoder layers that have it."""
    mixer: MixerKind | None = None
    """Kind of decoder layer that has it; None for those of every layer."""


class ExpertParameter(NamedTuple):
    """Tensor of all experts of a decoder layer: (experts, outputs, inputs)."""

    name: str
    experts: int
    inputs: int
    outputs: int

    @property
    def elements(self) -> int:
        """Weights of the tensor."""
        return self.experts * self.inputs * self.outputs


@dataclass(frozen=True)
class AdapterSpec:
    """Adapters of a run."""

    rank: int
    alpha: int
    scaling: float
    """Factor on an adapter's output."""
    rslora: bool
    """True if `scaling` is alpha / √rank instead of alpha / rank."""
    dropout: float
    dora: bool
    targets: tuple[str, ...]
    """Names of the linear layers with adapters."""
    modules_to_save: tuple[str, ...]
    """Modules trained in full."""
    quantize: str | None
    layers: tuple[LinearLayer, ...]
    """Linear layers with adapters in one decoder layer; in a hybrid model those of both kinds of layers."""
    matrices: int
    """Parameters of all adapters."""
    whole: int
    """Parameters of the modules trained in full."""
    experts: tuple[ExpertParameter, ...] = ()
    """Tensors of experts with adapters in each decoder layer: the first is wrapped first."""

    @property
    def adapted_expert_elements(self) -> int:
        """Weights of one layer's experts that adapters are added to."""
        return sum(each.elements for each in self.experts)

    def count_expert_adapters(self, layers: int) -> int:
        """Return the parameters of the experts' adapters in so many decoder layers."""
        return layers * self.rank * sum(each.experts * (each.inputs + each.outputs) for each in self.experts)

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of layers, expert tensors and whole modules that are trained, for people."""
        return (*self.targets, *(f"{each.name} of the experts" for each in self.experts))

    @property
    def trainable_parameters(self) -> int:
        """All trained parameters."""
        return self.matrices + self.whole

    def restrict_to(self, mixer: MixerKind) -> AdapterSpec:
        """Return the adapters with the linear layers of one kind of decoder layer; the counts stay those of all."""
        return replace(self, layers=tuple(layer for layer in self.layers if layer.mixer in {None, mixer}))


def list_linear_layers(name: str, family: Family, model: ModelDims) -> tuple[LinearLayer, ...]:
    """Return the linear layers of this name in one decoder layer; empty if the family has none."""
    if name not in family.lora_targets:
        return ()
    full, hidden = model.attention_layers, model.hidden
    heads = LinearLayer("heads", model.query_width, hidden, full, "attention")
    product = LinearLayer("product", model.intermediate, hidden, model.layers)
    keys_or_values = LinearLayer("attention", hidden, model.kv_width, full, "attention")
    into = LinearLayer("feed_forward", hidden, model.intermediate, model.layers)
    queries = model.query_width * (2 if model.output_gate else 1)
    found: dict[str, tuple[LinearLayer, ...]] = {
        **_list_linear_attention_layers(model),
        "q_proj": (LinearLayer("attention", hidden, queries, full, "attention"),),
        "k_proj": (keys_or_values,),
        "v_proj": (keys_or_values,),
        "o_proj": (heads,),
        "gate_proj": (into,),
        "up_proj": (into,),
        "down_proj": (product,),
        "c_attn": (LinearLayer("attention", hidden, model.query_width + 2 * model.kv_width, full, "attention"),),
        "c_fc": (into,),
        # StarCoder 1 also uses this name for the output layer of attention.
        "c_proj": (heads, product) if "c_attn" in family.lora_targets else (product,),
    }
    return found[name]


def _list_linear_attention_layers(model: ModelDims) -> dict[str, tuple[LinearLayer, ...]]:
    """Return the linear layers of linear attention by name."""
    linear = model.linear_attention
    if linear is None:
        return {}
    widths = {  # Qwen3-Next has the first two, Qwen3.5 the others
        "in_proj_qkvz": linear.input_width,
        "in_proj_ba": 2 * linear.value_heads,
        "in_proj_qkv": linear.convolved_width,
        "in_proj_z": linear.value_width,
        "in_proj_b": linear.value_heads,
        "in_proj_a": linear.value_heads,
    }
    return {
        **{
            name: (LinearLayer("attention", model.hidden, width, linear.layers, "linear_attention"),)
            for name, width in widths.items()
        },
        "out_proj": (LinearLayer("heads", linear.value_width, model.hidden, linear.layers, "linear_attention"),),
    }


def get_fully_trainable_modules(family: Family, model: ModelDims) -> dict[str, int]:
    """Return the parameters of modules that can be trained in full, by name."""
    return dict.fromkeys((family.embedding_name, "lm_head"), model.vocab * model.hidden)


def list_expert_parameters(model: ModelDims) -> tuple[ExpertParameter, ...]:
    """Return the tensors of a layer's experts in the order of transformers' classes; empty for a dense model."""
    if not model.experts:
        return ()
    hidden, width = model.hidden, model.intermediate
    return (
        ExpertParameter("gate_up_proj", model.experts, hidden, 2 * width),
        ExpertParameter("down_proj", model.experts, width, hidden),
    )


def build_adapter(lora: LoraConfig, family: Family, model: ModelDims) -> AdapterSpec:
    """Build the adapters of a configuration; names unknown to the family are ignored."""
    targets = family.lora_targets if lora.target_modules == "auto" else tuple(dict.fromkeys(lora.target_modules))
    layers = tuple(layer for name in targets for layer in list_linear_layers(name, family, model))
    matrices = sum(
        layer.layers * (lora.rank * (layer.inputs + layer.outputs) + (layer.outputs if lora.use_dora else 0))
        for layer in layers
    )
    modules, known = tuple(dict.fromkeys(lora.modules_to_save)), get_fully_trainable_modules(family, model)
    found = AdapterSpec(
        rank=lora.rank,
        alpha=lora.alpha,
        scaling=lora.alpha / (math.sqrt(lora.rank) if lora.use_rslora else lora.rank),
        rslora=lora.use_rslora,
        dropout=lora.dropout,
        dora=lora.use_dora,
        targets=targets,
        modules_to_save=modules,
        quantize=lora.quantize,
        layers=layers,
        matrices=matrices,
        whole=sum(known.get(name, 0) for name in modules),
        experts=tuple(each for each in list_expert_parameters(model) if each.name in lora.target_parameters),
    )
    return replace(found, matrices=matrices + found.count_expert_adapters(model.layers))
