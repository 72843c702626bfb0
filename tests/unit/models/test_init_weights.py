"""First weights depend on the seed and on the parameter's name, and on nothing else."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_training_toolkit.models import build_model, initialize_weights
from unit.models.test_document_isolation import HYBRIDS

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
    "max_position_embeddings": 128,
}
STARCODER2: dict[str, Any] = {key: QWEN3[key] for key in QWEN3 if key != "head_dim"} | {"model_type": "starcoder2"}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
GPT_BIGCODE: dict[str, Any] = {
    "model_type": "gpt_bigcode",
    "vocab_size": 512,
    "n_embd": 64,
    "n_inner": 256,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
}
ALL = pytest.mark.parametrize(
    "config", [QWEN3, QWEN3_MOE, STARCODER2, GPT_BIGCODE], ids=lambda config: config["model_type"]
)


def weights(config: dict[str, Any], seed: int = 1, precision: str = "fp32", noise: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(noise)
    model = build_model(config, precision=precision, attention="eager")
    initialize_weights(model, seed, lambda _: nullcontext())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def matrices(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.items() if tensor.dim() >= 2}


@ALL
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(config: dict[str, Any]) -> None:
    one, other = weights(config, noise=0), weights(config, noise=1)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@ALL
def test_another_seed_gives_other_weights_in_every_matrix(config: dict[str, Any]) -> None:
    one, other = matrices(weights(config, 1)), matrices(weights(config, 2))
    assert not any(torch.equal(one[name], other[name]) for name in one)


@ALL
def test_no_two_matrices_are_alike(config: dict[str, Any]) -> None:
    flat = [tensor.flatten()[:64] for tensor in matrices(weights(config)).values()]
    assert len({tuple(values.tolist()) for values in flat}) == len(flat)


def test_initialising_draws_nothing_from_the_common_generator() -> None:
    model = build_model(QWEN3, precision="fp32", attention="eager")
    before = torch.get_rng_state()
    initialize_weights(model, 1, lambda _: nullcontext())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [QWEN3, QWEN3_MOE, STARCODER2], ids=lambda config: config["model_type"])
def test_a_layer_more_leaves_the_others_as_they_were(config: dict[str, Any]) -> None:
    small, large = weights(config), weights(config | {"num_hidden_layers": 3})
    assert small.keys() < large.keys()
    assert all(torch.equal(small[name], large[name]) for name in small)


class Model(nn.Module):
    """Linear layers constructed in the given order."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(initializer_range=0.02, num_hidden_layers=2, model_type="any")
        for name in names:
            self.add_module(name, nn.Linear(8, 8))


def test_the_order_of_construction_means_nothing() -> None:
    models = [Model("a", "b", "c"), Model("c", "x", "b", "a")]
    for model in models:
        initialize_weights(model, 7, lambda _: nullcontext())
    one, other = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(one[name], other[name]) for name in one)


@ALL
def test_norms_are_one_and_biases_zero(config: dict[str, Any]) -> None:
    found = weights(config)
    norms = [name for name in found if "norm" in name or ".ln_" in name]
    assert norms
    for name in found:
        if name.endswith("bias"):
            assert (found[name] == 0).all(), name
        elif name in norms:
            assert (found[name] == 1).all(), name
        else:
            assert found[name].dim() >= 2, name


def assert_normal(values: Tensor, std: float, name: str) -> None:
    """Mean and standard deviation within five of their own standard errors."""
    number = values.numel()
    assert abs(values.mean().item()) < 5 * std / math.sqrt(number), name
    assert abs(values.std().item() - std) < 5 * std / math.sqrt(2 * number), name


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("config", [QWEN3, QWEN3_MOE, STARCODER2], ids=lambda config: config["model_type"])
def test_matrices_are_normal_with_the_configured_deviation(config: dict[str, Any], std: float) -> None:
    for name, tensor in matrices(weights(config | {"initializer_range": std})).items():
        assert_normal(tensor, std, name)


def test_gpt_bigcode_shrinks_what_is_added_to_the_residual_stream() -> None:
    found = matrices(weights(GPT_BIGCODE | {"initializer_range": 0.02}))
    residual = [name for name in found if name.endswith("c_proj.weight")]
    assert len(residual) == 2 * GPT_BIGCODE["n_layer"]
    for name, tensor in found.items():
        assert_normal(tensor, 0.02 / math.sqrt(2 * 2) if name in residual else 0.02, name)


def test_the_experts_of_a_layer_differ() -> None:
    for name, tensor in weights(QWEN3_MOE).items():
        if ".experts." in name:
            assert tensor.dim() == 3
            assert len({tuple(expert.flatten()[:64].tolist()) for expert in tensor}) == 4, name


def test_weights_in_bf16_are_those_in_fp32_rounded() -> None:
    exact, rounded = weights(QWEN3), weights(QWEN3, precision="bf16")
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)


def test_tied_weights_stay_tied() -> None:
    model: Any = build_model(QWEN3, precision="fp32", attention="eager")
    initialize_weights(model, 1, lambda _: nullcontext())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("config", HYBRIDS.values(), ids=HYBRIDS)
def test_a_hybrid_model_begins_as_in_transformers(config: dict[str, Any]) -> None:
    found = weights(config)
    torch.manual_seed(0)
    theirs = dict(build_model(config, precision="fp32", attention="eager").named_parameters())
    for name, tensor in found.items():
        if name.endswith("A_log"):
            assert (tensor >= math.log(0.01)).all()
            assert (tensor <= math.log(16)).all()
            assert len(set(tensor.tolist())) == len(tensor)
        elif tensor.dim() == 1:
            assert torch.equal(tensor, theirs[name]), name
