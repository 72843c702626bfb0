"""A run of a tiny model on a small corpus of code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_training_toolkit.config import Config, parse_config

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""A Qwen3 of 0.1 million parameters."""


def tiny_config(corpus: Path, runs: Path, **sections: dict[str, Any]) -> Config:
    """A run of a tiny model on a small corpus; sections are merged into it.

    In fp32: a processor without instructions for bf16 takes twenty times as long for it.
    """
    data: dict[str, Any] = {
        "run": {"name": "tiny", "dir": str(runs)},
        "model": {"name": "qwen3-0.6b", "config_overrides": dict(SHAPE), "loss_chunk_size": 64},
        "tokenizer": {"train": {"vocab_size": 512}},
        "data": {
            "sequence_length": 64,
            "sources": [{"path": str(corpus), "format": "code", "fim": {"rate": 0.5, "loss": "middle"}}],
            "eval": {"fraction": 0.1},
        },
        "train": {"steps": 9, "global_batch_size": 11, "micro_batch_size": 2, "precision": "fp32"},
        "optim": {"lr": 1e-3, "warmup": 2},
        "checkpoint": {"interval": 100, "keep_latest": 100},
        "eval": {"interval": 100},
        "export": {"at_end": False},
        "cluster": {"workers": 2},
        "failures": {"on_loss_spike": "ignore"},  # a few hundred tokens a step vary as much as spikes do
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return parse_config(data, "test")


def engine_at(zero: int) -> dict[str, Any]:
    """The section `engine` for a ZeRO stage.

    Stage 3 keeps parameters as small as these whole, and yet looks for the next use of each at every module: a third of
    a run of four layers with adapters. It does not look further than the distance that is set here.
    """
    if zero < 3:
        return {"zero_stage": zero}
    return {"zero_stage": zero, "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0}}}


def write_corpus(directory: Path, documents: int = 60) -> Path:
    """Small files of code of ragged lengths, each different."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            f"def function_{number}_{line}(a, b={line}):\n    return a * {number} + b\n"
            for line in range(1 + number % 7)
        ]
        (directory / f"module_{number:03d}.py").write_text("\n".join(lines))
    return directory
