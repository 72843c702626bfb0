"""Adapters in a model: what it was at first, the same for every order and split, packed documents apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_training_toolkit.config.model_config import LoraConfig
from llm_training_toolkit.families import AdapterSpec, read_model_dims
from llm_training_toolkit.families.lora import build_adapter
from llm_training_toolkit.families.qwen import QWEN3
from llm_training_toolkit.models import LossModule, build_model
from llm_training_toolkit.models.dropout import BatchPosition, SequenceDropout
from llm_training_toolkit.models.lora import add_adapters

CONFIG: dict[str, Any] = {
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
    "initializer_range": 0.3,
    "attention_bias": False,
}
ADAPTER = build_adapter(LoraConfig(rank=4), QWEN3, read_model_dims(CONFIG))
IDS = torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(24).expand_as(IDS)


def module_of(adapter: AdapterSpec | None = ADAPTER, *, seed: int = 3, learnt: bool = False, **how: Any) -> LossModule:
    """A frozen model with adapters; `learnt`: their second matrices are not zero any more."""
    torch.manual_seed(0)
    model = build_model(CONFIG, **{"precision": "fp32", "attention": "sdpa", **how})
    module = LossModule(model, 5)
    if adapter is not None:
        add_adapters(model, adapter, seed=seed, dtype=torch.float32, draws=module.batch_position)
    if learnt:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return module


def trained(module: LossModule) -> dict[str, Tensor]:
    return {name: each.detach() for name, each in module.named_parameters() if each.requires_grad}


def test_a_model_begins_as_what_it_was() -> None:
    assert torch.equal(module_of().compute_logits(IDS, POSITIONS), module_of(None).compute_logits(IDS, POSITIONS))
    dora = module_of(replace(ADAPTER, dora=True)).compute_logits(IDS, POSITIONS)
    torch.testing.assert_close(dora, module_of(None).compute_logits(IDS, POSITIONS), rtol=1e-4, atol=1e-4)


def test_first_weights_follow_from_seed_and_name_alone() -> None:
    few = replace(ADAPTER, targets=("v_proj", "down_proj"))
    whole, part, other = trained(module_of()), trained(module_of(few)), trained(module_of(seed=4))
    assert set(part) < set(whole)
    for name, values in part.items():
        assert torch.equal(values, whole[name])
        assert torch.equal(values, other[name]) == ("lora_B" in name)
    first = [values for name, values in whole.items() if "lora_A" in name]
    assert len({float(values.flatten()[0]) for values in first}) == len(first), "each drawn on its own"
    for values in first:
        bound = values.shape[1] ** -0.5
        assert 0.9 * bound < float(values.abs().max()) <= bound


def test_nothing_but_adapters_is_trained() -> None:
    module = module_of(learnt=True)
    module(IDS, POSITIONS, IDS).backward()
    gradients = {name: each.grad for name, each in module.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(trained(module))
    assert all("lora_" in name for name in trained(module))
    assert all(float(gradients[name].abs().max()) > 0 for name in trained(module))  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [0, 5, 1000])
def test_a_frozen_head_gives_the_same_gradients_in_chunks(chunk: int) -> None:
    module = module_of(learnt=True)
    module.lm.get_output_embeddings().loss_chunk = chunk  # type: ignore[operator]
    module(IDS, POSITIONS, IDS).backward()
    found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    module.zero_grad()
    logits = module.compute_logits(IDS, POSITIONS)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten(), reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, module.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_documents_stay_apart(recompute: str, dropout: float) -> None:
    module = module_of(replace(ADAPTER, dropout=dropout), learnt=True, activation_checkpointing=recompute).train()
    positions = torch.cat([torch.arange(9), torch.arange(15)]).expand_as(IDS)
    other = IDS.clone()
    other[:, :9] = (other[:, :9] + 7) % 512
    before, after = (module.compute_logits(each, positions).detach() for each in (IDS, other))
    assert torch.equal(before[:, 9:], after[:, 9:])
    assert not torch.isclose(before[:, :9], after[:, :9]).all(dim=-1).any()
    labels = torch.full_like(IDS, -100)
    labels[:, 9:] = 5
    embedding = module.lm.get_input_embeddings().weight  # type: ignore[operator]
    embedding.requires_grad_()
    module(IDS, positions, labels).backward()
    seen = set(embedding.grad.abs().sum(dim=-1).nonzero().flatten().tolist())
    assert seen == set(IDS[:, 9:].flatten().tolist())


def test_the_mask_of_a_sequence_is_its_own_whatever_the_split() -> None:
    draws = BatchPosition(step=7, first=0, rows=5)
    drop = SequenceDropout(0.25, 1, "layer", draws).train()
    inputs = torch.ones(5, 40, 30)
    whole = drop(inputs)
    assert torch.equal(drop(inputs.reshape(1, 200, 30)).reshape(5, 40, 30), whole), "rows as one row"
    draws.first, draws.rows = 2, 3
    assert torch.equal(drop(inputs[:3]), whole[2:])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 5
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float((whole == 0).float().mean()) == pytest.approx(0.25, abs=0.02)
    draws.first, draws.step, draws.rows = 0, 8, 5
    assert not torch.equal(drop(inputs), whole)
    assert not torch.equal(SequenceDropout(0.25, 1, "other", BatchPosition(7, rows=5)).train()(inputs), whole)
    assert torch.equal(drop.eval()(inputs), inputs)


def test_dropout_is_the_same_with_rows_one_by_one_and_as_one() -> None:
    adapter = replace(ADAPTER, dropout=0.5)
    positions = torch.cat([torch.arange(9), torch.arange(15)]).expand_as(IDS)
    rows, flat = (module_of(adapter, learnt=True, attention=kind).train() for kind in ("sdpa", "varlen"))
    loss = rows(IDS, positions, IDS)
    torch.testing.assert_close(flat(IDS, positions, IDS), loss, rtol=1e-6, atol=0)
    assert not torch.isclose(rows.eval()(IDS, positions, IDS), loss)
