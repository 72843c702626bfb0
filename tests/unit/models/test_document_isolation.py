"""Documents packed into one row do not see each other, with any attention, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_training_toolkit.models import LossModule, build_model

LENGTHS = (9, 14, 1, 8)
TOTAL = sum(LENGTHS)
SPANS = [slice(sum(LENGTHS[:i]), sum(LENGTHS[: i + 1])) for i in range(len(LENGTHS))]
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # attention that is sharp enough to show a leak
}
QWEN2 = {key: QWEN3[key] for key in QWEN3 if key != "head_dim"} | {"model_type": "qwen2"}
WINDOW = 8
"""Tokens of a sliding window: shorter than some of the documents."""
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": QWEN2,
    "qwen2, sliding window": QWEN2 | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
    "qwen3": QWEN3,
    "qwen3-moe": QWEN3
    | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "starcoder2": QWEN2 | {"model_type": "starcoder2", "sliding_window": None},
    "starcoder2, sliding window": QWEN2 | {"model_type": "starcoder2", "sliding_window": WINDOW},
    "starcoder 1": {
        "model_type": "gpt_bigcode",
        "tie_word_embeddings": False,
        "vocab_size": 512,
        "n_embd": 64,
        "n_inner": 128,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": 0.3,
    },
}


@pytest.fixture(params=list(MODELS))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return MODELS[request.param]


@pytest.fixture(params=["eager", "sdpa", "varlen"])
def attention(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(params=[False, True], ids=["keeping activations", "recomputing activations"])
def model(request: pytest.FixtureRequest, config: dict[str, Any], attention: str) -> LossModule:
    torch.manual_seed(0)
    recompute = bool(request.param)
    built = build_model(config, precision="fp32", attention=attention, activation_checkpointing=recompute)
    return LossModule(built, 5)


@pytest.fixture(params=[True, False], ids=["training", "evaluating"])
def training(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@contextmanager
def mode(model: LossModule, *, training: bool) -> Iterator[None]:
    model.train(training)
    with torch.set_grad_enabled(training):
        yield


def rows() -> tuple[Tensor, Tensor]:
    """Two different rows of four documents each; each document has token ids of its own range."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat(
        [torch.randint(100 * i, 100 * i + 100, (2, n), generator=generator) for i, n in enumerate(LENGTHS)], 1
    )
    return ids, torch.cat([torch.arange(length) for length in LENGTHS]).repeat(2, 1)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_changing_a_document_changes_no_logit_of_another(model: LossModule, changed: int, *, training: bool) -> None:
    ids, positions = rows()
    other = ids.clone()
    other[0, SPANS[changed]] += 7
    with mode(model, training=training):
        before, after = (model.compute_logits(each, positions).detach() for each in (ids, other))
    for document, span in enumerate(SPANS):
        assert torch.equal(before[1, span], after[1, span]), "the other row"
        if document == changed:
            assert not torch.isclose(before[0, span], after[0, span]).all(dim=-1).any()
        else:
            assert torch.equal(before[0, span], after[0, span]), f"document {document}"


def test_a_packed_document_has_the_logits_it_has_alone(model: LossModule, *, training: bool) -> None:
    ids, positions = rows()
    with mode(model, training=training):
        packed = model.compute_logits(ids, positions).detach()
        for span in SPANS:
            alone = model.compute_logits(ids[:, span], positions[:, span]).detach()
            torch.testing.assert_close(packed[:, span], alone, rtol=1e-4, atol=1e-4)


def test_within_a_document_a_token_changes_what_follows_and_nothing_before(model: LossModule) -> None:
    ids, positions = rows()
    other = ids.clone()
    middle = SPANS[1].start + 5
    other[0, middle] += 7
    with mode(model, training=False):
        before, after = (model.compute_logits(each, positions)[0] for each in (ids, other))
    same = (before == after).all(dim=-1)
    assert same.tolist() == [not middle <= place < SPANS[1].stop for place in range(TOTAL)]


@pytest.mark.parametrize("chosen", range(len(LENGTHS)))
def test_the_loss_of_a_document_sends_no_gradient_into_another(model: LossModule, chosen: int) -> None:
    ids, positions = rows()
    labels = torch.full_like(ids, -100)
    labels[:, SPANS[chosen]] = 5
    model.train()
    model(ids, positions, labels).backward()
    gradient = model.lm.get_input_embeddings().weight.grad  # type: ignore[operator]
    touched = {int(token) // 100 for token in gradient.abs().sum(dim=-1).nonzero()}
    assert touched == {chosen}


def test_the_loss_of_a_row_is_the_sum_over_its_documents(model: LossModule, *, training: bool) -> None:
    ids, positions = rows()
    labels = ids.roll(-1, 1)
    with mode(model, training=training):
        whole = model(ids, positions, labels)
        parts = [model(ids[:, span], positions[:, span], labels[:, span]) for span in SPANS]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-5, atol=1e-3)
