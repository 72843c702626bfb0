"""A tiny shape of each of the nine classes, as changes to a published size of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_QWEN = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_MIXTURE = {key: _QWEN[key] for key in _QWEN if key != "intermediate_size"} | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR = {
    "num_hidden_layers": 4,  # three of linear attention, one of full
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DECODER: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
"""The smallest Qwen3 that writes text; its vocabulary and positions are the test's."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _QWEN,
    "qwen3-0.6b": _QWEN | {"head_dim": 32},
    "qwen3-30b-a3b": {key: _QWEN[key] for key in _QWEN if key != "intermediate_size"}
    | {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "starcoder2-3b": _QWEN,
    "starcoderbase-1b": {"n_layer": 2, "n_embd": 64, "n_inner": 128, "n_head": 4, "n_positions": 128},
    "qwen3-next-80b-a3b-instruct": _MIXTURE | _LINEAR,
    "qwen3.5-4b": _QWEN | _LINEAR,
    "qwen3.5-35b-a3b": _MIXTURE | _LINEAR,
    "qwen2-57b-a14b": _MIXTURE,
}
"""By size. Heads x head_dim of Qwen3 is not its hidden size; the mixture has an output layer of its own."""

UNKNOWN_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
"""A config.json with dimensions that no known size has."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread: on some processors several give logits whose last bits differ from run to run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
