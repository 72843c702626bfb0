"""Gradients sent in bf16: those of fp32 but for rounding, at every ZeRO stage; a run's losses change as little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import largest_gradient_error, read_losses

Pools = Callable[[int], RankPool]
ROUNDING = 2**-8  # of a bf16 number; here each rank's sum is rounded, and the sum of both


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_differ_by_rounding_alone(pools: Pools, prepared_run: RunDirectory, zero: int) -> None:
    found = {}
    for sent in ("fp32", "bf16"):
        changes: dict[str, Any] = {"engine": {"zero_stage": zero, "communication_data_type": sent}}
        answers = pools(2).run(rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=3)
        found[sent] = answers[0]
    assert found["bf16"][0] == found["fp32"][0], "the loss comes before"
    assert 0 < largest_gradient_error(found["bf16"][2], found["fp32"][2]) < 2 * ROUNDING


def test_losses_of_a_run_change_little(pools: Pools, fresh_run: Callable[[str], RunDirectory]) -> None:
    losses = {}
    for sent in ("fp32", "bf16"):
        run = fresh_run(sent)
        changes = {"engine": {"zero_stage": 1, "communication_data_type": sent}}
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
        losses[sent] = [loss for _, loss in sorted(read_losses(run).items())]
    differences = [abs(each - other) for each, other in zip(losses["fp32"], losses["bf16"], strict=True)]
    assert differences[0] == 0
    assert 0 < max(differences) < 1e-2


@pytest.mark.parametrize("zero", [2, 3])
def test_losses_stay_bit_for_bit_with_the_exchange_beside_the_backward_pass(
    pools: Pools, fresh_run: Callable[[str], RunDirectory], zero: int
) -> None:
    """Buckets of some parameters each; a CPU has no streams, so that this shows their order and not their timing."""
    losses = []
    for overlaps in (False, True):
        run = fresh_run(f"overlap_{overlaps}")
        block = {"overlap_comm": overlaps, "reduce_bucket_size": 20_000}
        changes = {"engine": {"zero_stage": zero, "deepspeed": {"zero_optimization": block}}}
        pools(2).run(rank_tasks.train_run, run=str(run.path), changes=changes)
        losses.append(read_losses(run))
    assert len(losses[0]) == 9
    assert losses[0] == losses[1]
