"""Activation checkpointing: the numbers of a model without it, and the work that it repeats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llm_training_toolkit import families
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.lora import add_adapters
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing, count_recomputed_flops
from tiny_models import SHAPES

KINDS: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
METHODS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "whole model": ("sdpa", None),
    "adapters": ("varlen", {"rank": 4, "dropout": 0.1}),
    "DoRA": ("eager", {"rank": 4, "use_dora": True}),
}
"""Implementation of attention, and adapters."""
TOKENS = 64


def config_of(name: str, lora: dict[str, Any] | None) -> Config:
    return parse_config(
        {
            "run": {"name": "a"},
            "model": {"name": name, "config_overrides": SHAPES[name], "lora": lora},
            "tokenizer": {"path": "a"},
            "data": {"sequence_length": TOKENS, "sources": [{"path": "a", "format": "code"}]},
            "train": {"steps": 1},
        },
        "test",
    )


def module_of(name: str, kind: ActivationCheckpointing, attention: str, lora: dict[str, Any] | None) -> LossModule:
    config = config_of(name, lora)
    hf = dict(families.resolve_hf_config(config)) | {"vocab_size": 128}
    torch.manual_seed(0)
    model = build_model(hf, precision="fp32", attention=attention, activation_checkpointing=kind)
    module = LossModule(model, 16).train()
    adapter = families.resolve_adapter(config, hf)
    if adapter is not None:
        add_adapters(model, adapter, seed=0, dtype=torch.float32, draws=module.batch_position)
    return module


def run(module: LossModule) -> dict[str, Tensor]:
    """Loss and gradients of two rows of packed documents."""
    ids = torch.randint(0, 128, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in (40, 24, 10, 54)]).reshape(2, TOKENS)
    loss = module(ids, positions, ids.roll(-1, 1))
    loss.backward()
    gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    return {"loss": loss.detach(), **gradients}


# The reference code of linear attention is slow, and its adapters are as those of the others.
CASES = [(name, method) for name in SHAPES for method in METHODS if "next" not in name or method == "whole model"]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_losses_and_gradients_are_bit_for_bit_those_without(name: str, method: str) -> None:
    usual, *others = (run(module_of(name, kind, *METHODS[method])) for kind in KINDS)
    assert len(usual) > 1
    for found in others:
        assert found.keys() == usual.keys()
        assert all(torch.equal(found[key], usual[key]) for key in usual)


DENSE = [
    name
    for name, shape in SHAPES.items()
    if "num_experts" not in shape and "linear_num_value_heads" not in shape  # hybrid: other products in most layers
]


@pytest.mark.parametrize(("name", "method"), [*((name, "whole model") for name in DENSE), (DENSE[0], "adapters")])
def test_selective_repeats_as_many_operations_as_the_plan_counts(name: str, method: str) -> None:
    none, selective, full = (_count_flops(module_of(name, kind, *METHODS[method])) for kind in KINDS)
    config = config_of(name, METHODS[method][1])
    hf = families.resolve_hf_config(config)
    counted = count_recomputed_flops("selective", families.read_model_dims(hf), families.resolve_adapter(config, hf), 0)
    assert selective - none == 2 * TOKENS * counted
    assert none < selective < full


HYBRID = [name for name, shape in SHAPES.items() if "linear_num_value_heads" in shape]


@pytest.mark.parametrize("name", HYBRID)
def test_selective_repeats_the_products_of_linear_layers_that_the_plan_counts(name: str) -> None:
    """The recurrence and the experts are left out: on CPU their code differs from that of GPUs."""
    modules = [module_of(name, kind, *METHODS["whole model"]) for kind in ("none", "selective")]
    none, selective = (_count_flops(module, torch.ops.aten.mm) for module in modules)
    model = families.read_model_dims(families.resolve_hf_config(config_of(name, METHODS["whole model"][1])))
    linear = model.linear_attention
    assert linear is not None
    counted = count_recomputed_flops("selective", model, None, 0)
    counted -= 6 * linear.layers * linear.value_width * linear.key_head_dim
    counted -= 2 * model.layers * model.experts_per_token * model.feed_forward_parameters
    assert selective - none == 2 * TOKENS * counted


def _count_flops(module: LossModule, operator: Any = None) -> int:
    with FlopCounterMode(display=False) as counter:
        run(module)
    return int(counter.get_total_flops() if operator is None else counter.get_flop_counts()["Global"][operator])
