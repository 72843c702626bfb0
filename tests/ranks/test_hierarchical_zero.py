"""Weights gathered within nodes (`engine.zero_hpz_partition_size`): losses of a run without, also after a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.distributed as dist

import rank_tasks
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.plan import compute_replica_slice
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

SHARD_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def compute_losses(run: str, changes: Mapping[str, Any]) -> list[float]:
    """Losses of three steps from weights that were written into the fragments, as a resume does."""
    spec = rank_tasks.build_worker_spec(run, changes)
    plan = rank_tasks.build_plan(spec)
    engine = rank_tasks.build_engine(spec, plan)
    rank_tasks.perturb_weights(engine)
    dataloader = DataLoader(spec.dataset_info, global_batch=plan.global_batch, epochs=None)
    rows = compute_replica_slice(plan.global_batch, dist.get_world_size(), dist.get_rank())
    losses = []
    for step in range(3):
        batches = dataloader.get_micro_batches(step, rows, 1, plan.get_accumulation_steps(dist.get_world_size()))
        [total] = rank_tasks.build_context().all_reduce_sum(
            engine.forward_backward(batches, dataloader.count_loss_tokens(step))
        )
        engine.optim_step(1e-2)
        losses.append(total / dataloader.count_loss_tokens(step))
    engine.close()
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": {"deepspeed": SHARD_ALL}},
        {"engine": {"offload": "optimizer"}},
        {"model": {"lora": {"rank": 4}}},
    ],
    ids=["full", "offload", "lora"],
)
def test_losses_are_those_without_also_after_weights_were_written(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory], changes: dict[str, Any]
) -> None:
    run = fresh_run("run")  # adapters write their base weights into it
    changes = {"train": {"precision": "fp32", "global_batch_size": 8, "micro_batch_size": 1}} | changes
    engine: dict[str, Any] = changes.get("engine", {}) | {"zero_stage": 3}
    without, within_nodes = (
        pools(4).run(
            compute_losses,
            run=str(run.path),
            changes=changes | {"engine": engine | {"zero_hpz_partition_size": size}, "cluster": {"workers": 4}},
        )[0]
        for size in (1, 2)
    )
    assert within_nodes == without
    assert len(set(without)) == 3, "the weights move"
