"""The host waits for the device once a micro-batch, and a few times a step: otherwise a GPU runs out of work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

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
