"""The gradient of a global batch does not depend on how it is split, nor on the ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import largest_gradient_error

Pools = Callable[[int], RankPool]

SPLITS = [(1, 11), (1, 3), (2, 6), (2, 2)]
"""(workers, micro-batch) of 11 sequences: 1 x 1, 1 x 4, 2 x 1, and 2 x 3 with shares of 6 and 5."""


@pytest.fixture(scope="module")
def reference(pools: Pools, prepared_run: RunDirectory) -> tuple[float, float, dict[str, Any]]:
    """One worker, one micro-batch, no ZeRO, fp32."""
    changes = {"train": {"precision": "fp32"}, "engine": {"zero_stage": 0}}
    [found] = pools(1).run(rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=11)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("workers", "micro_batch"), SPLITS)
def test_gradients_agree_between_splits_and_stages(
    pools: Pools, prepared_run: RunDirectory, reference: Any, workers: int, micro_batch: int, zero: int
) -> None:
    changes = {"train": {"precision": "fp32"}, "engine": {"zero_stage": zero}}
    answers = pools(workers).run(
        rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=micro_batch
    )
    loss, norm, found = answers[0]
    assert largest_gradient_error(found, reference[2]) < 1e-5
    assert loss == pytest.approx(reference[0], rel=1e-6)
    assert norm == pytest.approx(reference[1], rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_trial_of_the_largest_micro_batch_changes_no_bit(pools: Pools, prepared_run: RunDirectory, zero: int) -> None:
    changes = {"train": {"precision": "fp32"}, "engine": {"zero_stage": zero}}
    plain, with_trial_pass = (
        pools(2).run(
            rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=2, trial_pass=each
        )[0]
        for each in (False, True)
    )
    assert with_trial_pass[:2] == plain[:2]
    for name, gradient in plain[2].items():
        assert np.array_equal(with_trial_pass[2][name], gradient), name


MIXTURE = {
    "name": "qwen3-30b-a3b",
    "config_overrides": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}


def changes_of_mixture(zero: int) -> dict[str, Any]:
    train = {"precision": "fp32", "router_balance": 0.1}
    return {"train": train, "engine": {"zero_stage": zero}, "model": MIXTURE}


@pytest.fixture(scope="module")
def reference_of_mixture(pools: Pools, prepared_run: RunDirectory) -> tuple[float, float, dict[str, Any]]:
    """One worker, one micro-batch, no ZeRO, fp32."""
    changes = changes_of_mixture(zero=0)
    [found] = pools(1).run(rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=11)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("workers", "micro_batch"), [(1, 3), (2, 2)])
def test_gradients_of_a_mixture_agree_between_splits_and_stages(
    pools: Pools, prepared_run: RunDirectory, reference_of_mixture: Any, workers: int, micro_batch: int, zero: int
) -> None:
    loss, norm, whole = reference_of_mixture
    answers = pools(workers).run(
        rank_tasks.compute_gradients,
        run=str(prepared_run.path),
        changes=changes_of_mixture(zero),
        micro_batch=micro_batch,
    )
    assert largest_gradient_error(answers[0][2], whole) < 1e-5
    assert answers[0][0] == pytest.approx(loss, rel=1e-6)
    assert answers[0][1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_rank_with_nothing_but_empty_micro_batches_adds_nothing(
    pools: Pools, prepared_run: RunDirectory, zero: int
) -> None:
    changes = {"train": {"precision": "fp32", "global_batch_size": 1}, "engine": {"zero_stage": zero}}
    [(loss, _, alone)] = pools(1).run(
        rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=1, step=3
    )
    answers = pools(2).run(
        rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=1, step=3
    )
    assert largest_gradient_error(answers[0][2], alone) < 1e-5
    assert answers[0][0] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_first_loss_in_bf16_is_the_same_for_every_stage(
    pools: Pools, prepared_run: RunDirectory, reference: Any, zero: int
) -> None:
    changes = {"train": {"precision": "bf16"}, "engine": {"zero_stage": zero}}
    loss, norm, found = pools(2).run(
        rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=2
    )[0]
    assert loss == pytest.approx(reference[0], rel=1e-3)
    assert norm == pytest.approx(reference[1], rel=2e-2)
    assert largest_gradient_error(found, reference[2]) < 5e-2


def test_the_norm_in_bf16_does_not_depend_on_the_number_of_workers(pools: Pools, prepared_run: RunDirectory) -> None:
    changes = {"train": {"precision": "bf16"}, "engine": {"zero_stage": 2}}
    norms = [
        pools(workers).run(rank_tasks.compute_gradients, run=str(prepared_run.path), changes=changes, micro_batch=1)[0][
            1
        ]
        for workers in (1, 2, 3)
    ]
    assert max(norms) / min(norms) < 1 + 5e-4
