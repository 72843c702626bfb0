"""The plan's peak of forward and backward against a pass without values, at the full width of a model."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing
from llm_training_toolkit.plan.memory.memory_estimate import estimate_pass_bytes
from memory_dry_run import DryRun, build_sized_run, list_recipe_runs

pytestmark = pytest.mark.slow
LORA = {"lora": {"rank": 64, "alpha": 16, "dropout": 0.05}}
TWO_LAYERS: dict[str, Any] = {"config_overrides": {"num_hidden_layers": 2}}
SMALL: list[tuple[str, ActivationCheckpointing, Any, dict[str, Any]]] = [
    ("qwen2.5-1.5b", "none", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "selective", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "selective", "varlen", TWO_LAYERS | LORA),
    ("starcoder2-3b", "selective", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "full", "varlen", TWO_LAYERS),
    ("qwen2.5-7b", "full", "masked", TWO_LAYERS | LORA),
    ("qwen3-30b-a3b", "full", "varlen", TWO_LAYERS),
    ("starcoder2-3b", "full", "varlen", TWO_LAYERS),
    ("starcoderbase-7b", "none", "masked", {"config_overrides": {"n_layer": 2}}),
]
FOUR_LAYERS = {"config_overrides": {"num_hidden_layers": 4}}  # three of linear attention, one of attention
HYBRID: list[tuple[str, ActivationCheckpointing, Any, dict[str, Any]]] = [
    ("qwen3.5-9b", "none", "varlen", FOUR_LAYERS),
    ("qwen3.5-35b-a3b", "selective", "varlen", FOUR_LAYERS | LORA),
    ("qwen3-coder-next", "full", "masked", FOUR_LAYERS),
]


def check(run: DryRun) -> None:
    assert estimate_pass_bytes(run.load) == pytest.approx(run.measure(), rel=0.05)


@pytest.mark.parametrize(("size", "checkpointing", "attention", "model"), [*SMALL, *HYBRID])
def test_few_layers_of_full_width(
    size: str, checkpointing: ActivationCheckpointing, attention: Any, model: dict[str, Any]
) -> None:
    check(build_sized_run(size, 4096, 1, checkpointing, attention, **model))


def test_32b_in_rows_of_32k_tokens() -> None:
    check(build_sized_run("qwen2.5-32b", 32768, 1, "full", **TWO_LAYERS))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_adapters_of_experts_add_to_a_copy_of_all_experts(checkpointing: ActivationCheckpointing) -> None:
    lora: dict[str, Any] = {"lora": {"rank": 16, "target_parameters": ["gate_up_proj", "down_proj"]}}
    run = build_sized_run("qwen3-30b-a3b", 16384, 1, checkpointing, "varlen", **TWO_LAYERS, **lora)
    assert 1 <= estimate_pass_bytes(run.load) / run.measure() < 1.08


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_row_of_128k_tokens_that_four_ranks_share(checkpointing: ActivationCheckpointing) -> None:
    check(build_sized_run("qwen2.5-7b", 131072, 1, checkpointing, sequence_parallel=4, **TWO_LAYERS))


@pytest.mark.slow
def test_a_whole_model_at_128k_tokens() -> None:
    check(build_sized_run("qwen2.5-7b", 131072, 1, "full", sequence_parallel=4))


# Five of the recipes, and each kind of checkpointing: the script has the table of all, which takes long.
RECIPES = [
    run
    for run in list_recipe_runs()
    if (run.name, run.load.checkpointing)
    in {
        ("lora-7b-one-gpu", "full"),
        ("moe-30b-two-nodes", "full"),
        ("fim2-3b", "none"),
        ("full-7b-one-node", "selective"),
        ("full-qwen3.5-0.8b-one-gpu", "none"),
    }
    and (run.load.micro_batch, run.load.attention) == (4, "varlen")
]


@pytest.mark.slow
@pytest.mark.parametrize("run", RECIPES, ids=lambda run: run.name)
def test_recipes_as_they_are(run: DryRun) -> None:
    check(run)
