"""The plan's count of activations against what autograd really keeps for the backward pass."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from llm_training_toolkit import families
from llm_training_toolkit.config import parse
from llm_training_toolkit.models import build_model
from llm_training_toolkit.plan.memory import Load, layer_bytes_per_token

TOKENS = 256
QWEN = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "vocab_size": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN | {"num_key_value_heads": 4, "head_dim": 64},
    "qwen3-30b-a3b": QWEN
    | {
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 16,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 192,
    },
    "qwen2.5-0.5b": QWEN | {"num_key_value_heads": 2},
    "starcoder2-3b": QWEN | {"num_key_value_heads": 2},
    "starcoderbase-1b": {"n_embd": 256, "n_inner": 768, "n_head": 8, "vocab_size": 256},
}


def hf_config(name: str, layers: int) -> dict[str, Any]:
    depth = "n_layer" if "n_embd" in SHAPES[name] else "num_hidden_layers"
    raw = {
        "run": {"name": "a"},
        "model": {"name": name, "shape": SHAPES[name] | {depth: layers}},
        "tokenizer": {"path": "a"},
        "data": {"sequence_length": TOKENS, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 1},
    }
    return dict(families.hf_config(parse(raw, "test")))


def kept_bytes(name: str, layers: int, precision: str, attention: str) -> int:
    """Bytes of all storages that autograd holds after the forward pass, the weights left out."""
    model: Any = build_model(hf_config(name, layers), precision=precision, attention=attention).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # holding it keeps its address its own
        return tensor

    ids = torch.randint(0, 256, (1, TOKENS))
    packed = torch.cat([torch.arange(TOKENS // 2)] * 2)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, position_ids=packed, use_cache=False)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_layer_keeps_what_the_plan_counts(name: str, precision: Literal["bf16", "fp32"], attention: str) -> None:
    load = Load(
        model=families.anatomy(hf_config(name, 1)),
        zero=0,
        precision=precision,
        workers=1,
        micro_batch=1,
        sequence_length=TOKENS,
        eager_attention=attention == "eager",
    )
    # The difference of two depths leaves out what lies outside the layers.
    layer = (kept_bytes(name, 3, precision, attention) - kept_bytes(name, 1, precision, attention)) / 2
    assert TOKENS * layer_bytes_per_token(load) == pytest.approx(layer, rel=0.02)
