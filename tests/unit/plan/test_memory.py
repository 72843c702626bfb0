"""Memory against sums done by hand, and its direction in every knob."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from llm_training_toolkit.config.schema import LoraConfig
from llm_training_toolkit.families import ModelDims
from llm_training_toolkit.families.lora import build_adapter
from llm_training_toolkit.families.qwen import QWEN3
from llm_training_toolkit.plan import DeviceWorkload, estimate_memory

MODEL = ModelDims(
    vocab=1000,
    hidden=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    intermediate=128,
    gated=True,
    tied=True,
    vectors_per_layer=128,
    vectors_outside=64,
)
P = MODEL.total_parameters
LOAD = DeviceWorkload(
    model=MODEL, zero=0, precision="bf16", workers=4, micro_batch=2, sequence_length=32, loss_chunk=16
)


@pytest.mark.parametrize(
    ("zero", "precision", "weights", "gradients", "optimizer"),
    [
        (0, "bf16", 2 * P, 4 * P + 2 * 64_000, 12 * P),
        (1, "bf16", 2 * P, 2 * P + P + 6 * P, 3 * P),
        (2, "bf16", 2 * P, P + 6 * P, 3 * P),
        (3, "bf16", P // 2 + 2 * P, P + 6 * P, 3 * P),
        (0, "fp32", 4 * P, 4 * P + 4 * P, 8 * P),
        (1, "fp32", 4 * P, 4 * P + P + 4 * P, 3 * P),
        (2, "fp32", 4 * P, P + 4 * P, 3 * P),
        (3, "fp32", P + 4 * P, P + 4 * P, 3 * P),
    ],
)
def test_state_by_stage(
    zero: int, precision: Literal["bf16", "fp32"], weights: int, gradients: int, optimizer: int
) -> None:
    memory = estimate_memory(replace(LOAD, zero=zero, precision=precision))
    assert P % 4 == 0
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)


def test_the_bucket_and_the_gathered_weights_are_bounded() -> None:
    memory = estimate_memory(replace(LOAD, zero=3, bucket=100, max_live=200))
    assert memory.weights == P // 2 + 2 * 64_000  # the embedding is larger than both, and cannot be divided
    assert memory.gradients == P + 6 * 64_000
    memory = estimate_memory(replace(LOAD, zero=3, bucket=70_000, max_live=80_000))
    assert memory.weights == P // 2 + 2 * 80_000
    assert memory.gradients == P + 6 * 70_000


def test_the_experts_of_a_layer_are_gathered_together() -> None:
    mixture = replace(MODEL, experts=8, experts_per_token=2)
    layer = 8 * (3 * 64 * 128 + 64)
    memory = estimate_memory(replace(LOAD, model=mixture, zero=3, bucket=100, max_live=200))
    assert memory.weights == mixture.total_parameters // 2 + 2 * layer
    assert memory.gradients == mixture.total_parameters + 6 * (8 * 2 * 64 * 128)


def test_activations_of_a_mixture_by_hand() -> None:
    mixture = replace(MODEL, experts=8, experts_per_token=2)
    more = 2 * (2 * 4 * 128 + 2 * 2 * 64 + 38) + 4 * 8 - 2 * 4 * 128
    assert (
        estimate_memory(replace(LOAD, model=mixture)).activations - estimate_memory(LOAD).activations == 3 * 64 * more
    )


def test_activations_by_hand() -> None:
    per_token = 2 * 64 * 4 + 2 * 4 * 64 + 2 * 4 * 128 + 32 * 2
    assert estimate_memory(LOAD).activations == 3 * 64 * per_token
    recomputed = estimate_memory(replace(LOAD, activation_checkpointing=True)).activations
    assert recomputed == 64 * (2 * 64 * 2 + 2 * per_token)


def test_logits_by_hand() -> None:
    assert estimate_memory(LOAD).logits == 16 * 1000 * 6 + 1000 * 64 * 2
    assert estimate_memory(replace(LOAD, loss_chunk=0)).logits == 64 * 1000 * 6 + 1000 * 64 * 2
    assert estimate_memory(replace(LOAD, loss_chunk=4096, precision="fp32")).logits == 64 * 1000 * 4 + 1000 * 64 * 4


ADAPTER = build_adapter(LoraConfig(rank=8, target_modules=("q_proj", "v_proj")), QWEN3, MODEL)
A = 2 * 8 * (64 + 64 + 64 + 32)
"""Two layers, rank 8: q from 64 to 64, v from 64 to 32."""


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [
        (0, 2 * (P + A), 6 * A, 12 * A),
        (1, 2 * (P + A), 2 * A + A + 6 * A, 3 * A),
        (2, 2 * (P + A), A + 6 * A, 3 * A),
        (3, (P + A) // 2 + 2 * (P + A), A + 6 * A, 3 * A),
    ],
)
def test_beside_adapters_a_model_has_weights_alone(zero: int, weights: int, gradients: int, optimizer: int) -> None:
    memory = estimate_memory(replace(LOAD, zero=zero, adapter=ADAPTER))
    assert ADAPTER.trainable_parameters == A
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.logits == 16 * 1000 * 6, "a frozen output layer has no gradient"
    whole_head = replace(ADAPTER, modules_to_save=("lm_head",))
    assert estimate_memory(replace(LOAD, adapter=whole_head)).logits == estimate_memory(LOAD).logits


def test_matrices_of_the_layers_in_four_bits() -> None:
    matrices = 2 * MODEL.matrices_per_layer
    memory = estimate_memory(replace(LOAD, adapter=replace(ADAPTER, quantize="nf4")))
    assert memory.weights == round((4 + 0.127) / 8 * matrices) + 2 * (P - matrices + A)


def test_activations_beside_a_frozen_layer_by_hand() -> None:
    per_token = 2 * 64 * 2 + 2 * 4 * 64 + 2 * 3 * 128 + 2 * 64 + 2 * 2 * 8 + 32 * 2
    assert estimate_memory(replace(LOAD, adapter=ADAPTER)).activations == 3 * 64 * per_token
    dropped = replace(ADAPTER, dropout=0.1)
    assert estimate_memory(replace(LOAD, adapter=dropped)).activations == 3 * 64 * (per_token - 2 * 64 + 2 * 3 * 64)


@pytest.mark.parametrize(
    "more", [{"micro_batch": 4}, {"sequence_length": 64}, {"eager_attention": True}, {"precision": "fp32"}]
)
def test_more_work_takes_more_activations(more: dict[str, Any]) -> None:
    assert estimate_memory(replace(LOAD, **more)).activations > estimate_memory(LOAD).activations


def test_gigabytes_are_of_ten_to_the_ninth() -> None:
    assert estimate_memory(LOAD).to_gigabytes()["weights"] == 2 * P / 1e9
