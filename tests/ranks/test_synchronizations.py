"""The host waits for the device once a micro-batch, and a few times a step: otherwise a GPU runs out of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from tiny_models import SHAPES

UPDATE = {0: 1, 1: 5, 2: 5, 3: 3}
"""Times in an update, by ZeRO stage: most of them are DeepSpeed's. Fewer are welcome."""


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_host_waits_once_a_micro_batch(
    pools: Callable[[int], RankPool], prepared_run: RunDirectory, zero: int
) -> None:
    changes = {"model": {"attn_implementation": "varlen"}, "engine": {"zero_stage": zero}}
    [counts] = pools(1).run(rank_tasks.count_synchronizations, run=str(prepared_run.path), changes=changes)
    assert counts["four"] - counts["two"] <= 2, "one a micro-batch: the number of loss tokens"
    assert counts["two"] <= 3, "and one a step: the sum of the losses"
    assert counts["update"] <= UPDATE[zero]


LORA = {"rank": 4, "dropout": 0.1}
MIXTURE: dict[str, Any] = {"name": "qwen3-30b-a3b", "config_overrides": SHAPES["qwen3-30b-a3b"]}
OTHERS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "adapters": (0, {"lora": LORA}, {}),
    "adapters at stage 2": (2, {"lora": LORA}, {}),
    "mixture": (0, MIXTURE, {}),
    "mixture with a balance loss": (1, MIXTURE | {"activation_checkpointing": "full"}, {"router_balance": 0.01}),
    "adapters of experts": (0, MIXTURE | {"lora": {"rank": 4, "target_parameters": ["down_proj"]}}, {}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_host_waits_no_more_often_with_adapters_and_with_experts(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory], case: str
) -> None:
    zero, model, train = OTHERS[case]
    changes = {"model": {"attn_implementation": "varlen"} | model, "engine": {"zero_stage": zero}, "train": train}
    [counts] = pools(1).run(rank_tasks.count_synchronizations, run=str(fresh_run("others").path), changes=changes)
    assert counts["four"] - counts["two"] <= 2, "one a micro-batch: the number of loss tokens"
    assert counts["two"] <= 3, "and one a step: the sum of the losses"
    assert counts["update"] <= UPDATE[zero]
