"""The plan's count of activations against what autograd really keeps for the backward pass."""

from __future__ import annotations

import weakref
from typing import Any, Literal

import pytest
import torch

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.families.lora import build_adapter
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.build import DTYPES
from llm_training_toolkit.models.dropout import BatchPosition
from llm_training_toolkit.models.lora import add_adapters
from llm_training_toolkit.plan.memory.activations import estimate_kept_bytes, estimate_layer_bytes, get_attention_memory
from llm_training_toolkit.plan.memory.memory_estimate import DeviceWorkload

pytestmark = pytest.mark.slow  # 62 cases, 40 s of processor time
TOKENS = 256
QWEN = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "vocab_size": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN | {"num_key_value_heads": 4, "head_dim": 64},
    "qwen3-30b-a3b": {
        "hidden_size": 256,
        "vocab_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 192,
    },
    "qwen2-57b-a14b": {
        "hidden_size": 256,
        "vocab_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 192,
        "shared_expert_intermediate_size": 640,
    },
    "qwen2.5-0.5b": QWEN | {"num_key_value_heads": 2},
    "starcoder2-3b": QWEN | {"num_key_value_heads": 2},
    "starcoderbase-1b": {"n_embd": 256, "n_inner": 768, "n_head": 8, "vocab_size": 256},
}


def hf_config(name: str, layers: int) -> dict[str, Any]:
    depth = "n_layer" if "n_embd" in SHAPES[name] else "num_hidden_layers"
    raw = {
        "run": {"name": "a"},
        "model": {"name": name, "config_overrides": SHAPES[name] | {depth: layers}},
        "tokenizer": {"path": "a"},
        "data": {"sequence_length": TOKENS, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 1},
    }
    return dict(families.resolve_hf_config(parse_config(raw, "test")))


class Held:
    """A tensor that autograd keeps; it goes when autograd lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_bytes(name: str, layers: int, precision: str, attention: str, lora: LoraConfig | None = None) -> int:
    """Bytes of all storages that autograd holds after the forward pass, the weights left out."""
    hf = hf_config(name, layers)
    model: Any = build_model(hf, precision=precision, attention=attention).train()
    if lora is not None:
        adapter = build_adapter(lora, families.find_size(name).family, families.read_model_dims(hf))
        add_adapters(model, adapter, seed=0, dtype=DTYPES[precision], draws=BatchPosition())
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def keep(tensor: torch.Tensor) -> Held:
        held.add(kept := Held(tensor))
        return kept

    ids = torch.randint(0, 256, (1, TOKENS))
    packed = torch.cat([torch.arange(TOKENS // 2)] * 2)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        out = model.base_model(input_ids=ids, position_ids=packed, use_cache=False)
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in held}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert out.last_hidden_state.requires_grad
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_keeps_what_the_plan_counts(name: str, precision: Literal["bf16", "fp32"], attention: str) -> None:
    load = DeviceWorkload(
        model=families.read_model_dims(hf_config(name, 1)),
        zero=0,
        precision=precision,
        workers=1,
        micro_batch=1,
        sequence_length=TOKENS,
        attention=get_attention_memory(attention),
    )
    # The difference of two depths leaves out what lies outside the layers.
    layer = (kept_bytes(name, 3, precision, attention) - kept_bytes(name, 1, precision, attention)) / 2
    assert TOKENS * estimate_layer_bytes(load.build_pass_shape()) == pytest.approx(layer, rel=0.02)


@pytest.mark.parametrize("experts", [("gate_up_proj", "down_proj"), ("down_proj",)], ids=str)
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen2-57b-a14b"])
def test_a_layer_keeps_a_copy_of_experts_with_adapters(name: str, experts: tuple[Any, ...]) -> None:
    family, model = families.find_size(name).family, families.read_model_dims(hf_config(name, 2))
    lora = LoraConfig(rank=4, target_parameters=experts)
    load = DeviceWorkload(
        model=model,
        zero=0,
        precision="bf16",
        workers=1,
        micro_batch=1,
        sequence_length=TOKENS,
        adapter=build_adapter(lora, family, model),
    )
    mask = TOKENS * TOKENS  # outside the layers
    layers = kept_bytes(name, 4, "bf16", "sdpa", lora) - kept_bytes(name, 2, "bf16", "sdpa", lora)
    assert estimate_kept_bytes(load.build_pass_shape()) - mask == pytest.approx(layers, rel=0.03)


ADAPTERS = [
    ("bf16", LoraConfig()),
    ("fp32", LoraConfig()),
    ("bf16", LoraConfig(dropout=0.1)),
    ("bf16", LoraConfig(use_dora=True)),
    ("bf16", LoraConfig(target_modules=("o_proj", "down_proj"))),
]


@pytest.mark.parametrize(("precision", "lora"), ADAPTERS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_frozen_layer_and_its_adapters_keep_what_the_plan_counts(
    name: str, precision: Literal["bf16", "fp32"], lora: LoraConfig
) -> None:
    family, model = families.find_size(name).family, families.read_model_dims(hf_config(name, 1))
    if not set(family.lora_targets) >= set(
        family.lora_targets if lora.target_modules == "auto" else lora.target_modules
    ):
        lora = lora.model_copy(update={"target_modules": family.lora_targets[-2:]})
    adapter = build_adapter(lora, family, model)
    load = DeviceWorkload(
        model=model,
        zero=0,
        precision=precision,
        workers=1,
        micro_batch=1,
        sequence_length=TOKENS,
        adapter=adapter,
    )
    # The first layer keeps less: nothing before it is trained, so its norm and projections have nobody to tell.
    layer = (kept_bytes(name, 4, precision, "sdpa", lora) - kept_bytes(name, 2, precision, "sdpa", lora)) / 2
    assert TOKENS * estimate_layer_bytes(load.build_pass_shape()) == pytest.approx(layer, rel=0.03)
