"""What adapters add to a model: the layers they go to and the parameters that makes. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from llm_training_toolkit.config.schema import LoraConfig
from llm_training_toolkit.families.family import Family, ModelDims

Reads = Literal["attention", "heads", "feed_forward", "product"]
"""What a linear layer reads: the norm before attention, what the heads give, the norm before the feed-forward layer, or
what that layer has made of it."""


class LinearLayer(NamedTuple):
    """A linear layer within a decoder layer."""

    reads: Reads
    inputs: int
    outputs: int


@dataclass(frozen=True)
class AdapterSpec:
    """The adapters of a run."""

    rank: int
    alpha: int
    scaling: float
    """What an adapter adds is multiplied by this."""
    rslora: bool
    """Scaled by alpha / root of rank, and not by alpha / rank."""
    dropout: float
    dora: bool
    targets: tuple[str, ...]
    """Names of the linear layers that have adapters."""
    modules_to_save: tuple[str, ...]
    """Modules that are trained whole."""
    quantize: str | None
    layers: tuple[LinearLayer, ...]
    """The linear layers of one decoder layer that have adapters."""
    matrices: int
    """Parameters of all adapters."""
    whole: int
    """Parameters of the modules that are trained whole."""

    @property
    def trainable_parameters(self) -> int:
        """Everything that is trained."""
        return self.matrices + self.whole


def list_linear_layers(name: str, family: Family, model: ModelDims) -> tuple[LinearLayer, ...]:
    """The linear layers of this name in one decoder layer; none where the family has no such layer."""
    if name not in family.lora_targets:
        return ()
    heads = LinearLayer("heads", model.query_width, model.hidden)
    product = LinearLayer("product", model.intermediate, model.hidden)
    keys_or_values = LinearLayer("attention", model.hidden, model.kv_width)
    into = LinearLayer("feed_forward", model.hidden, model.intermediate)
    found: dict[str, tuple[LinearLayer, ...]] = {
        "q_proj": (LinearLayer("attention", model.hidden, model.query_width),),
        "k_proj": (keys_or_values,),
        "v_proj": (keys_or_values,),
        "o_proj": (heads,),
        "gate_proj": (into,),
        "up_proj": (into,),
        "down_proj": (product,),
        "c_attn": (LinearLayer("attention", model.hidden, model.query_width + 2 * model.kv_width),),
        "c_fc": (into,),
        # StarCoder 1 calls the last layer of attention so, too.
        "c_proj": (heads, product) if "c_attn" in family.lora_targets else (product,),
    }
    return found[name]


def get_fully_trainable_modules(family: Family, model: ModelDims) -> dict[str, int]:
    """Parameters of the modules that can be trained whole, by name."""
    return dict.fromkeys((family.embedding_name, "lm_head"), model.vocab * model.hidden)


def build_adapter(lora: LoraConfig, family: Family, model: ModelDims) -> AdapterSpec:
    """The adapters that a configuration asks for; names that the family does not know add nothing."""
    targets = family.lora_targets if lora.target_modules == "auto" else tuple(dict.fromkeys(lora.target_modules))
    layers = tuple(layer for name in targets for layer in list_linear_layers(name, family, model))
    each = sum(lora.rank * (inputs + outputs) + (outputs if lora.use_dora else 0) for _, inputs, outputs in layers)
    modules, known = tuple(dict.fromkeys(lora.modules_to_save)), get_fully_trainable_modules(family, model)
    return AdapterSpec(
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
        matrices=model.layers * each,
        whole=sum(known.get(name, 0) for name in modules),
    )
