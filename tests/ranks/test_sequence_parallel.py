"""Ranks that share the tokens of each row have the loss and the gradients of one rank that has the rows whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import rank_tasks
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from run_results import read_fetched, read_values
from tiny_runs import SHAPE

Pools = Callable[[int], RankPool]
Gradients = tuple[float, float, dict[str, Any]]

MODEL: dict[str, Any] = {"config_overrides": SHAPE | {"num_attention_heads": 8, "num_key_value_heads": 4}}
"""Two query heads for each of four key-value heads, which two and four ranks divide."""
WIDE: dict[str, Any] = {key: value for key, value in MODEL["config_overrides"].items() if key != "head_dim"}
MIXTURE: dict[str, Any] = {key: value for key, value in MODEL["config_overrides"].items() if key != "intermediate_size"}
MIXTURE |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def compute_gradients(
    pools: Pools, run: RunDirectory, ranks: int, each: int, zero: int, micro_batch: int, **sections: dict[str, Any]
) -> Gradients:
    """Loss, norm and gradients of 11 sequences on so many ranks, `each` of which are a replica."""
    changes = {"model": MODEL, "train": {"precision": "fp32"}, **sections}
    changes["engine"] = {"zero_stage": zero, "sequence_parallel": each} | changes.get("engine", {})
    found = pools(ranks).run(
        rank_tasks.compute_gradients,
        run=str(run.path),
        changes=changes,
        micro_batch=micro_batch,
        perturbed="lora" in changes["model"],
    )
    return found[0]  # type: ignore[no-any-return]


def assert_agree(found: Gradients, wanted: Gradients) -> None:
    """Losses, norms and gradients agree within 1e-6, gradients relative to the largest."""
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1] == pytest.approx(wanted[1], rel=1e-6)
    assert found[2].keys() == wanted[2].keys()
    largest = max(float(np.abs(values).max()) for values in wanted[2].values())
    errors = {name: float(np.abs(found[2][name] - values).max()) / largest for name, values in wanted[2].items()}
    assert max(errors.values()) < 1e-6, errors


@pytest.fixture(scope="module")
def reference(pools: Pools, prepared_run: RunDirectory) -> Gradients:
    """One rank, all rows in one micro-batch, masked attention."""
    return compute_gradients(pools, prepared_run, 1, 1, 0, micro_batch=11)


# Micro-batches of one and three rows, so that the cut goes through rows, and through documents in them.
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "each", "micro_batch"), [(2, 2, 1), (4, 2, 3), (4, 4, 3)])
def test_gradients_are_those_of_one_rank(
    pools: Pools, prepared_run: RunDirectory, reference: Gradients, ranks: int, each: int, micro_batch: int, zero: int
) -> None:
    assert_agree(compute_gradients(pools, prepared_run, ranks, each, zero, micro_batch), reference)


@pytest.mark.parametrize(
    "sections",
    [
        {"model": MODEL | {"activation_checkpointing": "full"}},
        {"model": MODEL | {"activation_checkpointing": "selective"}},
        {"model": MODEL | {"lora": {"rank": 4, "alpha": 8}, "name": "qwen2.5-0.5b", "config_overrides": WIDE}},
        {"model": {"name": "starcoder2-3b", "config_overrides": WIDE | {"sliding_window": 24}}},
        {"model": {"name": "qwen3-30b-a3b", "config_overrides": MIXTURE}},
        {"model": MODEL, "engine": {"offload": "optimizer_and_weights"}},
    ],
    ids=["full", "selective", "adapters", "window", "mixture", "offload"],
)
def test_gradients_of_other_models_and_settings_are_those_of_one_rank(
    pools: Pools, fresh_run: Callable[[str], RunDirectory], sections: dict[str, Any]
) -> None:
    run = fresh_run("run")  # which adapters write their base weights into
    alone = {section: values for section, values in sections.items() if section != "engine"}
    wanted = compute_gradients(pools, run, 1, 1, 0, micro_batch=3, **alone)
    assert_agree(compute_gradients(pools, run, 2, 2, 3, micro_batch=3, **sections), wanted)


def test_runs_change_the_ranks_of_a_replica_at_a_resume(pools: Pools, fresh_run: Callable[[str], RunDirectory]) -> None:
    def work(run: RunDirectory, ranks: int, each: int, zero: int, stop: int | None) -> None:
        changes = {
            "model": MODEL,
            "engine": {"zero_stage": zero, "sequence_parallel": each},
            "eval": {"interval": 4},
            "failures": {"log_samples": True},
        }
        pools(ranks).run(rank_tasks.train_run, run=str(run.path), changes=changes, stop_after=stop)

    whole, changing = fresh_run("whole"), fresh_run("changing")
    work(whole, 1, 1, 0, None)
    for ranks, each, zero, stop in [(2, 2, 1, 2), (4, 2, 3, 4), (4, 4, 2, 6), (2, 1, 3, None)]:
        work(changing, ranks, each, zero, stop)
    for name in ("train/loss", "eval/loss"):
        wanted = read_values(whole, name)
        assert len(wanted) >= 4
        assert read_values(changing, name) == pytest.approx(wanted, rel=1e-6)
    assert read_fetched(changing) == read_fetched(whole)
