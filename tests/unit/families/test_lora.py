"""Adapters are counted as peft makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_training_toolkit import families
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.families.flops import compute_training_flops
from llm_training_toolkit.families.lora import build_adapter, list_linear_layers
from llm_training_toolkit.models import build_model
from llm_training_toolkit.models.lora import (
    add_adapters,
    compute_expert_delta,
    find_lora_layers,
    name_expert_adapter,
)

WIDE = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = WIDE | {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False}
BIGCODE = {"n_layer": 2, "n_embd": 64, "n_inner": 96, "n_head": 4, "vocab_size": 512, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": GROUPED,
    "qwen3-0.6b": GROUPED | {"head_dim": 24},
    "qwen3-next-80b-a3b-instruct": {key: GROUPED[key] for key in GROUPED if key != "intermediate_size"}
    | {
        "num_hidden_layers": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2-57b-a14b": {key: GROUPED[key] for key in GROUPED if key != "intermediate_size"}
    | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3.5-4b": GROUPED | {"num_hidden_layers": 4, "head_dim": 24, "linear_num_value_heads": 16},
    "starcoder2-3b": GROUPED,
    "starcoderbase-1b": BIGCODE,
}
LORAS = [
    {"rank": 3},
    {"rank": 5, "use_dora": True},
    {"rank": 2, "target_modules": [0, 0]},
    {"rank": 2, "target_modules": [1], "modules_to_save": ["lm_head"]},
    {"rank": 4, "modules_to_save": ["lm_head", 0]},
]
EXPERTS = [("gate_up_proj", "down_proj"), ("down_proj",)]


def hf_config(name: str) -> dict[str, Any]:
    raw = {
        "run": {"name": "a"},
        "model": {"name": name, "config_overrides": SHAPES[name]},
        "tokenizer": {"path": "a"},
        "data": {"sequence_length": 64, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 1},
    }
    return dict(families.resolve_hf_config(parse_config(raw, "test")))


def named(lora: dict[str, Any], family: families.Family) -> LoraConfig:
    """Numbers stand for the family's own names."""
    targets = [family.lora_targets[number] for number in lora.get("target_modules", ())] or "auto"
    modules = [family.embedding_name if name == 0 else name for name in lora.get("modules_to_save", ())]
    return LoraConfig.model_validate(lora | {"target_modules": targets, "modules_to_save": modules})


@pytest.mark.parametrize("lora", LORAS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_the_count_is_that_of_peft(name: str, lora: dict[str, Any]) -> None:
    family, hf = families.find_size(name).family, hf_config(name)
    adapter = build_adapter(named(lora, family), family, families.read_model_dims(hf))
    model = build_model(hf, precision="fp32", attention="sdpa")
    add_adapters(model, adapter, seed=0, dtype=torch.float32)
    assert adapter.trainable_parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)
    layers = find_lora_layers(model)
    assert len(layers) == sum(layer.layers for layer in adapter.layers)
    assert {layer.split(".")[-1] for layer in layers} == set(adapter.targets)
    expected = {layer.scaling["default"] for layer in layers.values()}
    assert expected == {adapter.scaling}


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "num_experts" in shape])
def test_adapters_of_experts_are_counted_as_peft_makes_them(name: str, experts: tuple[Any, ...]) -> None:
    family, hf = families.find_size(name).family, hf_config(name)
    dims = families.read_model_dims(hf)
    adapter = build_adapter(LoraConfig(rank=3, target_parameters=experts), family, dims)
    model = build_model(hf, precision="fp32", attention="sdpa")
    found = dict(model.named_parameters())
    add_adapters(model, adapter, seed=0, dtype=torch.float32)
    assert adapter.trainable_parameters == sum(each.numel() for each in model.parameters() if each.requires_grad)
    layers = find_lora_layers(model)
    for parameter in found:
        module = name_expert_adapter(parameter, adapter)
        assert (module is not None) == parameter.endswith(tuple(f".experts.{each}" for each in experts))
        assert module is None or layers[module].parameter_name == parameter.rpartition(".")[2]
    assert len(layers) == sum(layer.layers for layer in adapter.layers) + dims.layers * len(experts)


def test_what_is_added_to_experts_is_what_peft_adds() -> None:
    name = "qwen2-57b-a14b"
    family, hf = families.find_size(name).family, hf_config(name)
    lora = LoraConfig(rank=3, target_parameters=("gate_up_proj", "down_proj"))
    adapter = build_adapter(lora, family, families.read_model_dims(hf))
    model = build_model(hf, precision="fp32", attention="sdpa")
    add_adapters(model, adapter, seed=0, dtype=torch.float32)
    layer = find_lora_layers(model)["model.layers.1.mlp.experts"]
    layer.lora_B["default"].weight.data.normal_()
    found = compute_expert_delta(layer.lora_A["default"].weight, layer.lora_B["default"].weight, 4)
    wanted = layer.get_delta_weight("default")
    assert found.shape == layer.get_param().shape
    assert torch.allclose(adapter.scaling * found, wanted, rtol=1e-5, atol=1e-6)


def test_an_expert_adapter_costs_the_gradient_of_the_sum() -> None:
    name = "qwen2-57b-a14b"
    family, dims = families.find_size(name).family, families.read_model_dims(hf_config(name))
    plain, both = (
        build_adapter(LoraConfig(rank=3, target_parameters=experts), family, dims) for experts in ((), EXPERTS[0])
    )
    # Of 4 experts a token passes 2, each of 3 matrices of 64 x 24.
    added = compute_training_flops(dims, both).per_token - compute_training_flops(dims, plain).per_token
    assert added == 2 * dims.layers * 2 * 3 * 64 * 24


@pytest.mark.parametrize("name", SHAPES)
def test_auto_means_every_linear_layer_of_a_decoder_layer(name: str) -> None:
    family, hf = families.find_size(name).family, hf_config(name)
    model = build_model(hf, precision="fp32", attention="sdpa")
    linear = {
        path.split(".")[-1]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".shared_expert" not in path
    }
    assert set(family.lora_targets) == linear - {"lm_head"}


def test_every_family_knows_the_size_of_what_it_names() -> None:
    for size in families.SIZES.values():
        dims = size.family.read_dims(size.hf_values)
        assert all(list_linear_layers(name, size.family, dims) for name in size.family.lora_targets)
        assert list_linear_layers("lm_head", size.family, dims) == ()
