"""The first update is the same for every ZeRO stage, moments and step counter included.

A wrapper that steps the optimizer while it is built would leave Adam's bias correction one step ahead: the first update
would be 0.73 of the right one, silently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

Pools = Callable[[int], RankPool]


def state_after_one_update(
    pools: Pools, run: RunDirectory, directory: Path, workers: int, zero: int, precision: str
) -> dict[str, Any]:
    changes = {"train": {"precision": precision}, "engine": {"zero_stage": zero}}
    target = str(directory / f"step_000000000_a{zero}")
    state: dict[str, Any] = pools(workers).run(
        rank_tasks.take_first_update, run=str(run.path), changes=changes, directory=target
    )[0]
    return state


@pytest.fixture(scope="module")
def zero_2(
    pools: Pools, prepared_run: RunDirectory, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The state after one update of two ranks under ZeRO 2, by precision."""

    @cache
    def state(precision: str) -> dict[str, Any]:
        return state_after_one_update(pools, prepared_run, tmp_path_factory.mktemp("zero_2"), 2, 2, precision)

    return state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_one_update_is_that_of_zero_2(
    pools: Pools,
    prepared_run: RunDirectory,
    zero_2: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    zero: int,
    precision: str,
) -> None:
    found = state_after_one_update(pools, prepared_run, tmp_path, 2, zero, precision)
    reference = zero_2(precision)
    assert found.keys() == reference.keys()
    for name, values in reference.items():
        kind = name.rsplit("/", 1)[1]
        if kind == "weights":
            # Adam's first update is +- lr wherever the gradient is not tiny; a wrong step counter changes all of them.
            assert np.median(np.abs(found[name] - values)) < 1e-6, name
        else:
            scale = float(np.abs(values).max()) + 1e-30
            assert float(np.abs(found[name] - values).max()) / scale < (1e-5 if precision == "fp32" else 5e-2), name


def test_the_update_has_the_size_that_adam_says(pools: Pools, prepared_run: RunDirectory, tmp_path: Path) -> None:
    for zero in range(4):
        state = state_after_one_update(pools, prepared_run, tmp_path, 1, zero, "bf16")
        moment = state["model.layers.0.mlp.up_proj.weight/exp_avg"]
        assert float(np.abs(moment).max()) > 0
        # The norm begins at 1 and has no weight decay: 1 -+ lr, but where bf16 has rounded the gradient to nothing.
        felt = np.abs(state["model.norm.weight/exp_avg"]) > 1e-7
        assert felt.mean() > 0.9
        assert np.abs(np.abs(state["model.norm.weight/weights"][felt] - 1.0) - 1e-3).max() < 1e-4
