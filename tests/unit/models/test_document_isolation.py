"""Documents packed into one row do not see each other, with any attention, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_training_toolkit import families
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families.family import ISOLATED_MODEL_TYPES
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing

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
    "qwen2-moe": QWEN2
    | {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
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
HYBRID = QWEN3 | {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3-next": HYBRID | EXPERTS | {"model_type": "qwen3_next"},
    "qwen3.5": HYBRID | {"model_type": "qwen3_5_text"},
    "qwen3.5-moe": HYBRID | EXPERTS | {"model_type": "qwen3_5_moe_text"},
}


@pytest.fixture(scope="module", params=list(MODELS | HYBRIDS))
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return (MODELS | HYBRIDS)[request.param]


@pytest.fixture(scope="module", params=["eager", "sdpa", "varlen"])
def attention(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def plain_model(config: dict[str, Any], attention: str) -> LossModule:
    return make_model(config, attention, "none")


@pytest.fixture(scope="module", params=["none", "full"])
def model(request: pytest.FixtureRequest, config: dict[str, Any], attention: str) -> LossModule:
    return make_model(config, attention, request.param)


@pytest.fixture(scope="module", params=["training", "evaluating", "checkpointing"])
def model_in_mode(request: pytest.FixtureRequest, config: dict[str, Any], attention: str) -> LossModule:
    """A model that trains, evaluates, or trains with checkpointing, which evaluation never does."""
    model = make_model(config, attention, "full" if request.param == "checkpointing" else "none")
    return model.train(request.param != "evaluating")


@pytest.fixture
def moded_model(model_in_mode: LossModule) -> Iterator[LossModule]:
    """The model, with gradients while it trains."""
    with torch.set_grad_enabled(model_in_mode.training):
        yield model_in_mode


def make_model(config: dict[str, Any], attention: str, checkpointing: ActivationCheckpointing) -> LossModule:
    torch.manual_seed(0)
    built = build_model(config, precision="fp32", attention=attention, activation_checkpointing=checkpointing)
    return LossModule(built, 5)


def rows() -> tuple[Tensor, Tensor]:
    """Two different rows of four documents each; each document has token ids of its own range."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.cat(
        [torch.randint(100 * i, 100 * i + 100, (2, n), generator=generator) for i, n in enumerate(LENGTHS)], 1
    )
    return ids, torch.cat([torch.arange(length) for length in LENGTHS]).repeat(2, 1)


def test_changing_a_document_changes_no_logit_of_another(moded_model: LossModule) -> None:
    ids, positions = rows()
    before = moded_model.compute_logits(ids, positions).detach()
    for changed, place in enumerate(SPANS):
        other = ids.clone()
        other[0, place] += 7
        after = moded_model.compute_logits(other, positions).detach()
        assert torch.equal(before[1], after[1]), "the other row"
        assert not torch.isclose(before[0, place], after[0, place]).all(dim=-1).any()
        for document, span in enumerate(SPANS):
            assert document == changed or torch.equal(before[0, span], after[0, span]), f"document {document}"


def test_a_packed_document_has_the_logits_it_has_alone(moded_model: LossModule) -> None:
    ids, positions = rows()
    packed = moded_model.compute_logits(ids, positions).detach()
    for span in SPANS:
        alone = moded_model.compute_logits(ids[:, span], positions[:, span]).detach()
        rounding = 1e-4 * max(1.0, float(alone.abs().max()))
        torch.testing.assert_close(packed[:, span], alone, rtol=1e-4, atol=rounding)


def test_within_a_document_a_token_changes_what_follows_and_nothing_before(plain_model: LossModule) -> None:
    ids, positions = rows()
    other = ids.clone()
    middle = SPANS[1].start + 5
    other[0, middle] += 7
    plain_model.eval()
    with torch.no_grad():
        before, after = (plain_model.compute_logits(each, positions)[0] for each in (ids, other))
    same = (before == after).all(dim=-1)
    assert same.tolist() == [not middle <= place < SPANS[1].stop for place in range(TOTAL)]


@pytest.mark.parametrize("chosen", range(len(LENGTHS)))
def test_the_loss_of_a_document_sends_no_gradient_into_another(plain_model: LossModule, chosen: int) -> None:
    ids, positions = rows()
    labels = torch.full_like(ids, -100)
    labels[:, SPANS[chosen]] = 5
    plain_model.train().zero_grad()
    plain_model(ids, positions, labels).backward()
    gradient = plain_model.lm.get_input_embeddings().weight.grad  # type: ignore[operator]
    touched = {int(token) // 100 for token in gradient.abs().sum(dim=-1).nonzero()}
    assert touched == {chosen}


def test_the_loss_of_a_row_is_the_sum_over_its_documents(moded_model: LossModule) -> None:
    ids, positions = rows()
    labels = ids.roll(-1, 1)
    whole = moded_model(ids, positions, labels)
    parts = [moded_model(ids[:, span], positions[:, span], labels[:, span]) for span in SPANS]
    torch.testing.assert_close(whole, torch.stack(parts).sum(), rtol=1e-5, atol=1e-3)


def gradients(model: LossModule, *arguments: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss: Tensor = model(*arguments)
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


def test_the_gradients_of_packed_rows_are_those_of_the_documents_alone(model: LossModule) -> None:
    ids, positions = rows()
    labels = ids.roll(-1, 1)
    packed = gradients(model, ids, positions, labels)
    alone = [gradients(model, *(each[:, span] for each in (ids, positions, labels))) for span in SPANS]
    assert packed.keys() == set().union(*alone)
    for name, found in packed.items():
        wanted = torch.stack([part[name] for part in alone if name in part]).sum(0)
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()), name


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_broken_isolation_is_seen(name: str) -> None:
    """Positions that begin anew are not enough for a recurrence: transformers alone leaks, and so do wrong bounds."""
    torch.manual_seed(0)
    built: Any = build_model(HYBRIDS[name], precision="fp32", attention="sdpa").eval()
    ids, positions = rows()
    other = ids.clone()
    other[0, SPANS[0]] += 7
    labels = torch.full_like(ids, -100)
    labels[:, SPANS[1]] = 5
    one = torch.tensor([0, 2 * TOTAL], dtype=torch.int32)
    with torch.no_grad():
        before, after = (built(input_ids=each, position_ids=positions, use_cache=False).logits for each in (ids, other))
        assert float((before - after)[0, SPANS[1]].abs().max()) > 1
        module = LossModule(built, 5)
        right = [float(module(each, positions, labels)) for each in (ids, other)]
        wrong = [float(module(each, positions, labels, one, 2 * TOTAL)) for each in (ids, other)]
    assert right[0] == right[1]
    assert abs(wrong[0] - wrong[1]) > 0.1


@pytest.mark.parametrize("name", list(HYBRIDS))
def test_a_hybrid_model_still_generates_as_transformers_does(name: str) -> None:
    torch.manual_seed(0)
    built: Any = build_model(HYBRIDS[name], precision="fp32", attention="sdpa").eval()
    ids = rows()[0][:1, :9]
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": True}
    wanted = built.generate(ids, attention_mask=torch.ones_like(ids), **options)
    module = LossModule(built, 5)
    with torch.no_grad():
        module(*rows(), rows()[0])
    assert torch.equal(built.generate(ids, attention_mask=torch.ones_like(ids), **options), wanted)


def test_every_class_that_the_plan_packs_is_tested_here() -> None:
    assert {config["model_type"] for config in (MODELS | HYBRIDS).values()} == ISOLATED_MODEL_TYPES
    assert {family.model_type for family in families.FAMILIES.values()} <= ISOLATED_MODEL_TYPES


def test_layers_of_another_kind_are_refused() -> None:
    built = build_model(QWEN3, precision="fp32", attention="sdpa")
    built.config.layer_types = ["full_attention", "mamba"]  # type: ignore[union-attr]
    with pytest.raises(PlanError, match=r"Qwen3ForCausalLM has layers \(mamba\) that mix packed documents"):
        LossModule(built, 5)
