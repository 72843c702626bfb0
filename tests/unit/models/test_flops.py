"""The FLOPs behind MFU against those that torch counts in a forward and backward pass.

Eager attention, experts one after another and whole logits: torch's counter has no formula for grouped products or for
sdpa on the CPU, and it counts recomputed logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm_training_toolkit import families
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.lora import add_adapters
from tiny_models import SHAPES

ROWS, LENGTH, RANK = 2, 64, 4
VOCABULARY = {"vocab_size": 512}  # otherwise the output layer is nearly all


def build_run(size: str, **model: Any) -> Config:
    raw = {
        "run": {"name": "test"},
        "model": {"name": size, "config_overrides": SHAPES[size]} | model,
        "tokenizer": {"path": "tokenizer"},
        "data": {"sequence_length": LENGTH, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10},
    }
    return Config.model_validate(raw)


HYBRID = [
    size for size in SHAPES if families.read_model_dims(families.resolve_hf_config(build_run(size))).linear_attention
]
FULL_ATTENTION = sorted(SHAPES.keys() - set(HYBRID))


def build_module(hf: dict[str, Any], adapter: families.AdapterSpec | None) -> LossModule:
    model: Any = build_model(hf, precision="fp32", attention="eager")
    if "num_experts" in hf:
        model.set_experts_implementation("eager")
    module = LossModule(model, 0)
    if adapter is not None:
        add_adapters(model, adapter, seed=1, dtype=torch.float32)
    return module


def count_flops(module: nn.Module, labels: torch.Tensor, operators: tuple[Any, ...] = ()) -> int:
    """FLOPs of a pass over whole rows of one document each, by torch; of all operators, or of some."""
    ids = torch.randint(0, VOCABULARY["vocab_size"], (ROWS, LENGTH))
    with FlopCounterMode(display=False) as counter:
        module(ids, torch.arange(LENGTH).repeat(ROWS, 1), labels).backward()
    by_operator = counter.get_flop_counts()["Global"]
    return sum(int(count) for operator, count in by_operator.items() if not operators or operator in operators)


def count_formula(flops: families.TrainingFlops, loss_tokens: int) -> int:
    return flops.count_step_flops(ROWS * LENGTH, loss_tokens, ROWS * LENGTH * LENGTH)


@pytest.mark.parametrize("size", FULL_ATTENTION)
def test_full_training_needs_what_torch_counts(size: str) -> None:
    hf = families.resolve_hf_config(build_run(size)) | VOCABULARY
    labels = torch.randint(0, VOCABULARY["vocab_size"], (ROWS, LENGTH))
    labels[:, :20] = -100
    counted = count_flops(build_module(hf, None), labels)
    assert count_formula(families.resolve_training_flops(hf), ROWS * (LENGTH - 20)) == counted


@pytest.mark.parametrize("size", FULL_ATTENTION)
def test_frozen_weights_have_no_gradient_of_their_own(size: str) -> None:
    run = build_run(size, lora={"rank": RANK})
    hf = families.resolve_hf_config(run) | VOCABULARY
    adapter = families.resolve_adapter(run, hf)
    counted = count_flops(build_module(hf, adapter), torch.zeros(ROWS, LENGTH, dtype=torch.long))
    # Nothing before the first layer is trained: its input has no gradient, 1 of the 28 layers of a 7B model's q, k, v.
    dims = families.read_model_dims(hf)
    width = dims.query_width + 2 * dims.kv_width
    adapted = RANK * (1 if "c_attn" in adapter.targets else 3) if adapter else 0
    skipped = 2 * ROWS * LENGTH * dims.hidden * (width + adapted)
    formula = count_formula(families.resolve_training_flops(hf, adapter), ROWS * LENGTH)
    assert formula - skipped == counted


@pytest.mark.parametrize("size", HYBRID)
def test_the_linear_layers_of_a_hybrid_model_need_what_torch_counts(size: str) -> None:
    """Its recurrence is left out: the reference code computes products of chunks of 64 tokens in its place."""
    hf = families.resolve_hf_config(build_run(size)) | VOCABULARY
    model = families.read_model_dims(hf)
    assert model.linear_attention is not None
    linear = model.linear_attention
    recurrence = 18 * linear.layers * linear.value_width * linear.key_head_dim
    flops = families.resolve_training_flops(hf)
    expected = (flops.per_token - recurrence + flops.per_loss_token) * ROWS * LENGTH
    labels = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    assert count_flops(build_module(hf, None), labels, operators=(torch.ops.aten.mm,)) == expected
