"""The plan's peak of forward and backward against a pass without values, at the full width of a model."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit.plan.memory import estimate_pass_bytes
from memory_dry_run import DryRun, build_sized_run, list_recipe_runs

LORA = {"lora": {"rank": 64, "alpha": 16, "dropout": 0.05}}
TWO_LAYERS = {"config_overrides": {"num_hidden_layers": 2}}
SMALL: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("qwen2.5-1.5b", "none", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "full", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "full", "masked", TWO_LAYERS | LORA),
    ("qwen3-30b-a3b", "full", "varlen", TWO_LAYERS),
    ("starcoder2-3b", "full", "varlen", TWO_LAYERS),
    ("starcoderbase-7b", "none", "masked", {"config_overrides": {"n_layer": 2}}),
]


def check(run: DryRun) -> None:
    assert estimate_pass_bytes(run.load) == pytest.approx(run.measure(), rel=0.05)


@pytest.mark.parametrize(("size", "checkpointing", "attention", "model"), SMALL)
def test_two_layers_of_full_width(size: str, checkpointing: str, attention: Any, model: dict[str, Any]) -> None:
    check(build_sized_run(size, 4096, 1, checkpointing, attention, **model))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "length"), [("qwen2.5-7b", 131_072), ("qwen2.5-32b", 32_768)])
def test_whole_models_with_long_sequences(size: str, length: int) -> None:
    check(build_sized_run(size, length, 1, "full"))


@pytest.mark.slow
@pytest.mark.parametrize("run", list_recipe_runs(), ids=lambda run: run.name)
def test_every_recipe(run: DryRun) -> None:
    check(run)
