"""Memory against sums done by hand, and its direction in every knob."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.config.schema import Offload
from llm_training_toolkit.families import ModelDims
from llm_training_toolkit.families.lora import build_adapter
from llm_training_toolkit.families.qwen import QWEN3
from llm_training_toolkit.plan import DeviceWorkload, estimate_memory
from llm_training_toolkit.plan.memory.activations import (
    estimate_backward_bytes,
    estimate_final_norm_bytes,
    estimate_kept_bytes,
    estimate_layer_bytes,
    get_attention_memory,
)
from llm_training_toolkit.plan.memory.host_memory import (
    LOADING_CHUNK_BYTES,
    estimate_host_bytes,
    estimate_peak_host_bytes,
)
from llm_training_toolkit.plan.memory.memory_estimate import (
    estimate_gradient_bytes,
    estimate_logit_bytes,
    estimate_pass_bytes,
    estimate_weight_bytes,
)

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


HEAD = 64_000  # the largest tensor, embedding and output layer in one


SHORT = replace(LOAD, model=replace(MODEL, vocab=16), micro_batch=1, sequence_length=2)
Q = SHORT.model.total_parameters


@pytest.mark.parametrize(
    ("zero", "precision", "weights", "gradients", "optimizer"),
    [
        (1, "bf16", 2 * Q, 4 * Q, 3 * Q),
        (2, "bf16", 2 * Q, Q + 8 * Q, 3 * Q),
        (3, "bf16", Q // 2, Q + 10 * Q, 3 * Q),
        (0, "fp32", 4 * Q, 4 * Q + 4 * Q, 8 * Q),
        (1, "fp32", 4 * Q, 4 * Q, 2 * Q),
        (2, "fp32", 4 * Q, Q + 8 * Q, 3 * Q),
        (3, "fp32", Q + 4 * Q, Q + 8 * Q, 3 * Q),
    ],
)
def test_gradients_on_their_way_are_the_peak_of_short_sequences(
    zero: int, precision: Literal["bf16", "fp32"], weights: int, gradients: int, optimizer: int
) -> None:
    memory = estimate_memory(replace(SHORT, zero=zero, precision=precision))
    assert Q % 4 == 0
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.activations + memory.logits < Q


def test_activations_and_logits_are_the_peak_of_long_sequences() -> None:
    long = replace(LOAD, micro_batch=64)
    memory = estimate_memory(long)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * P, 4 * P, 12 * P)
    assert memory.activations + memory.logits == estimate_pass_bytes(long)
    assert memory.total == 18 * P + estimate_pass_bytes(long)


@pytest.mark.parametrize(("zero", "standing"), [(0, 4 * P), (1, 4 * P), (2, P), (3, P)])
def test_gradients_that_stand_between_micro_batches(zero: int, standing: int) -> None:
    assert estimate_gradient_bytes(replace(LOAD, zero=zero)) == standing


@pytest.mark.parametrize(
    ("zero", "offload", "weights", "gradients", "host"),
    [
        (1, "none", 2 * P, 4 * P, 3 * P),
        (1, "optimizer", 2 * P, 4 * P, 4 * P + P // 2 + 3 * P),
        (3, "optimizer", P // 2 + 2 * P, 0, 8 * P),
        (3, "optimizer_and_weights", 2 * P, 0, 8 * P + P // 2),
    ],
)
def test_what_is_kept_in_host_memory_is_not_on_the_device(
    zero: int, offload: Offload, weights: int, gradients: int, host: int
) -> None:
    load = replace(LOAD, zero=zero, offload=offload)
    memory = estimate_memory(load)
    assert (memory.weights, estimate_gradient_bytes(load), estimate_host_bytes(load)) == (weights, gradients, host)
    assert memory.optimizer == (3 * P if offload == "none" else 0)


def test_the_bucket_and_the_gathered_weights_are_bounded() -> None:
    load = replace(LOAD, zero=3, bucket=100, max_live=200)
    assert estimate_weight_bytes(load) == P // 2 + 2 * HEAD  # larger than both, and cannot be divided
    assert load.bucket_elements == HEAD
    load = replace(LOAD, zero=3, bucket=70_000, max_live=80_000)
    assert estimate_weight_bytes(load) == P // 2 + 2 * 80_000
    assert load.bucket_elements == 70_000
    several = estimate_memory(replace(SHORT, zero=3, bucket=Q // 2))
    assert several.gradients == Q + 10 * Q // 2
    assert several.activations > 0, "the first of several buckets is full before backward ends"


def test_the_experts_of_a_layer_are_gathered_together() -> None:
    mixture = replace(MODEL, experts=8, experts_per_token=2)
    layer = 8 * (3 * 64 * 128 + 64)
    load = replace(LOAD, model=mixture, zero=3, bucket=100, max_live=200)
    assert estimate_weight_bytes(load) == mixture.total_parameters // 2 + 2 * layer
    assert load.bucket_elements == 8 * 2 * 64 * 128


def test_activations_of_a_mixture_by_hand() -> None:
    mixture = replace(MODEL, experts=8, experts_per_token=2)
    more = 2 * (2 * 4 * 128 + 2 * 2 * 64 + 38) + 4 * 8 - 2 * 4 * 128
    plain, mixed = (replace(LOAD, model=model).build_pass_shape() for model in (MODEL, mixture))
    assert estimate_layer_bytes(mixed) - estimate_layer_bytes(plain) == more


def test_activations_by_hand() -> None:
    shape = LOAD.build_pass_shape()
    per_token = 2 * 64 * 4 + 2 * 4 * 64 + 2 * 4 * 128 + 4 * 4 + 32 * 2
    assert estimate_layer_bytes(shape) == per_token
    assert estimate_kept_bytes(shape) == 64 * (2 * per_token + 32)
    assert estimate_final_norm_bytes(shape) == 64 * (64 * 4 + 64 * 2)
    gradients = 64 * (2 * 64 + 2 * 2 * 128)  # of the layer's output, of the product and of one factor
    assert estimate_backward_bytes(shape) == gradients
    recomputed = replace(LOAD, checkpointing="full").build_pass_shape()
    assert estimate_kept_bytes(recomputed) == 64 * (2 * 64 * 2 + 32)
    assert estimate_backward_bytes(recomputed) == gradients + 64 * (per_token - 64 * 2)


def test_attention_of_variable_length_keeps_neither_masks_nor_repeated_keys() -> None:
    masked, varlen = (
        estimate_layer_bytes(replace(LOAD, attention=get_attention_memory(name)).build_pass_shape())
        for name in ("sdpa", "flash_attention_2")
    )
    assert masked - varlen == 2 * 2 * (64 - 32) + 32 * 2
    assert get_attention_memory("eager") == "eager"


def test_logits_by_hand() -> None:
    assert estimate_logit_bytes(LOAD) == 64 * 64 * 2 + max(16 * 1000 * 6, 2 * HEAD + 4 * 1000 * 6)
    assert estimate_logit_bytes(replace(LOAD, loss_chunk=0)) == 64 * 64 * 2 + 64 * 1000 * 6 + 2 * HEAD
    fp32 = replace(LOAD, loss_chunk=4096, precision="fp32")
    assert estimate_logit_bytes(fp32) == 64 * 64 * 4 + 64 * 1000 * 4 + 4 * HEAD


ADAPTER = build_adapter(LoraConfig(rank=8, target_modules=("q_proj", "v_proj")), QWEN3, MODEL)
A = 2 * 8 * (64 + 64 + 64 + 32)
"""Two layers, rank 8: q from 64 to 64, v from 64 to 32."""


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer"),
    [
        (0, 2 * (P + A), 4 * A, 12 * A),
        (1, 2 * (P + A), 4 * A, 3 * A),
        (2, 2 * (P + A), A + 2 * A, 3 * A),
        (3, (P + A) // 2 + 2 * (P + A), A + 6 * A, 3 * A),
    ],
)
def test_beside_adapters_a_model_has_weights_alone(zero: int, weights: int, gradients: int, optimizer: int) -> None:
    load = replace(LOAD, zero=zero, adapter=ADAPTER)
    memory = estimate_memory(load)
    assert ADAPTER.trainable_parameters == A
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.activations + memory.logits == estimate_pass_bytes(load)
    assert estimate_logit_bytes(load) == 64 * 64 * 2 + 16 * 1000 * 6, "a frozen output layer has no gradient"
    whole_head = replace(ADAPTER, modules_to_save=("lm_head",))
    assert estimate_logit_bytes(replace(LOAD, adapter=whole_head)) == estimate_logit_bytes(LOAD)


def test_matrices_of_the_layers_in_four_bits() -> None:
    matrices = 2 * (MODEL.attention_matrices + MODEL.feed_forward_matrices)
    memory = estimate_memory(replace(LOAD, adapter=replace(ADAPTER, quantize="nf4")))
    assert memory.weights == round((4 + 0.127) / 8 * matrices) + 2 * (P - matrices + A)


def test_activations_beside_a_frozen_layer_by_hand() -> None:
    per_token = 2 * 64 * 2 + 2 * 4 * 64 + 2 * 3 * 128 + 2 * 64 + 2 * 2 * 8 + 4 * 4 + 32 * 2
    assert estimate_layer_bytes(replace(LOAD, adapter=ADAPTER).build_pass_shape()) == per_token
    dropped = replace(LOAD, adapter=replace(ADAPTER, dropout=0.1))
    assert estimate_layer_bytes(dropped.build_pass_shape()) == per_token - 2 * 64 + 2 * 3 * 64


def test_one_matrix_in_four_bits_is_whole_while_it_multiplies() -> None:
    plain, quantized = (
        estimate_pass_bytes(replace(LOAD, adapter=replace(ADAPTER, quantize=kind), checkpointing="full", loss_chunk=1))
        for kind in (None, "nf4")
    )
    assert quantized - plain == 2 * 64 * 128


@pytest.mark.parametrize(
    "more", [{"micro_batch": 4}, {"sequence_length": 64}, {"attention": "eager"}, {"precision": "fp32"}]
)
def test_more_work_takes_more_activations(more: dict[str, Any]) -> None:
    assert estimate_pass_bytes(replace(LOAD, **more)) > estimate_pass_bytes(LOAD)


def test_gigabytes_are_of_ten_to_the_ninth() -> None:
    assert estimate_memory(LOAD).to_gigabytes()["weights"] == 2 * P / 1e9


def test_host_memory_is_a_tensor_while_loading_or_the_copy_of_a_checkpoint() -> None:
    adapter = build_adapter(LoraConfig(rank=1), QWEN3, MODEL)
    assert estimate_peak_host_bytes(LOAD) == max(4 * HEAD, 3 * P)
    assert estimate_peak_host_bytes(replace(LOAD, workers=1)) == 12 * P
    assert 12 * adapter.trainable_parameters // 4 < 4 * HEAD
    assert estimate_peak_host_bytes(replace(LOAD, adapter=adapter, zero=3)) == 4 * HEAD
    assert estimate_peak_host_bytes(replace(LOAD, adapter=adapter)) == LOADING_CHUNK_BYTES, "its base is streamed"
