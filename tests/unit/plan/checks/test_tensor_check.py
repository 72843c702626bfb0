"""Matrices that ranks cannot share are refused before anything starts, with a code and what works instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import Plan, make_plan
from llm_training_toolkit.plan.forecast.cluster_estimate import estimate_on_cluster
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware
from llm_training_toolkit.plan.memory.memory_settings import choose_memory_settings
from llm_training_toolkit.plan.plan import check_plan
from llm_training_toolkit.plan.text import format_plan
from tiny_runs import tiny_config

NOWHERE = Path("nowhere")
CLUSTER = Path(__file__).parents[4] / "cluster" / "aws-h100.yaml"


def config(**sections: dict[str, Any]) -> Config:
    """Two workers that share matrices, and two key-value heads."""
    engine = {"tensor_parallel": 2} | sections.pop("engine", {})
    return tiny_config(NOWHERE, NOWHERE, engine=engine, **sections)


def codes(plan: Plan) -> dict[str, str]:
    """Keys of the problems by their codes."""
    return {problem.code: problem.where for problem in plan.problems}


KEY = "engine.tensor_parallel"
REFUSED: list[tuple[dict[str, dict[str, Any]], dict[str, str]]] = [
    ({"cluster": {"workers": 3}}, {"tensor-parallel-workers": "cluster.workers"}),
    ({"cluster": {"workers": [2, 5]}}, {"tensor-parallel-workers": "cluster.workers"}),
    ({"engine": {"tensor_parallel": 4}, "cluster": {"workers": 4}}, {"tensor-parallel-heads": KEY}),
    (
        {"model": {"name": "starcoderbase-1b", "config_overrides": {}}},
        {"tensor-parallel-heads": KEY, "tensor-parallel-model": KEY},
    ),
    ({"model": {"name": "qwen3-30b-a3b", "config_overrides": {}}}, {"tensor-parallel-model": KEY}),
    ({"model": {"name": "qwen3.5-4b", "config_overrides": {}}}, {"tensor-parallel-model": KEY}),
    ({"model": {"lora": {}}}, {"tensor-parallel-lora": "model.lora"}),
    ({"engine": {"zero_stage": 2}}, {"tensor-parallel-stage": "engine.zero_stage"}),
    ({"engine": {"zero_stage": 3}}, {"tensor-parallel-stage": "engine.zero_stage"}),
    ({"engine": {"sequence_parallel": 2}, "cluster": {"workers": 4}}, {"tensor-parallel-sequence": KEY}),
    (
        {"engine": {"deepspeed": {"zero_optimization": {"overlap_comm": True}}}},
        {"tensor-parallel-deepspeed": "engine.deepspeed.zero_optimization"},
    ),
    (
        {"engine": {"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}},
        {"deepspeed-owned-key": "engine.deepspeed.tensor_parallel"},
    ),
    ({"model": {"compile": True}}, {"not-compiled": "model.compile"}),
]


@pytest.mark.parametrize(("sections", "wanted"), REFUSED)
def test_it_is_refused(sections: dict[str, dict[str, Any]], wanted: dict[str, str]) -> None:
    plan = make_plan(config(**sections))
    assert wanted.items() <= codes(plan).items()
    assert all(code in wanted or "zero" in where for code, where in codes(plan).items())
    with pytest.raises(PlanError):
        check_plan(plan)


def test_the_message_names_what_works_instead() -> None:
    [problem] = make_plan(config(engine={"tensor_parallel": 4}, cluster={"workers": 4})).problems
    assert "4 query heads, 2 key-value heads and feed-forward width 128" in problem.what
    assert problem.fix == "Use 1 or 2"


def test_replicas_divide_the_batch() -> None:
    plan = make_plan(config(cluster={"workers": [2, 6]}))
    assert plan.problems == ()
    assert (plan.ranks, plan.replicas, plan.split_batch()) == (6, 3, (4, 4, 3))
    assert plan.to_json()["accumulation"] == {"2": 6, "4": 3, "6": 2, "8": 2}


def test_a_device_holds_a_slice_of_the_matrices_and_its_share_of_their_state() -> None:
    def plan(each: int, zero: int) -> Plan:
        return make_plan(
            config(
                model={"name": "qwen2.5-7b", "config_overrides": {"vocab_size": 152_064}},
                train={"precision": "bf16", "micro_batch_size": 1},
                engine={"tensor_parallel": each, "zero_stage": zero},
                cluster={"workers": 4},
            )
        )

    whole, cut = plan(1, 0), plan(4, 0).memory_gb_per_device
    outside = 2 * 152_064 * 3584  # embedding and output layer stay whole
    matrices = whole.parameters - outside
    assert whole.memory_gb_per_device["weights"] == pytest.approx(2e-9 * whole.parameters)
    assert cut["weights"] == pytest.approx(2e-9 * (outside + matrices / 4), rel=1e-3)
    assert cut["optimizer"] == pytest.approx(12e-9 * (outside + matrices / 4), rel=1e-3)
    assert plan(2, 1).memory_gb_per_device["optimizer"] == pytest.approx(6e-9 * (outside + matrices / 2), rel=1e-3)


@pytest.mark.parametrize(
    ("workers", "stage", "line"),
    [
        (2, "auto", "2 workers to a replica hold slices of the matrices; ZeRO 0 (auto)"),
        (4, 1, "2 workers to a replica hold slices of the matrices; ZeRO 1 spreads optimizer state over 2 replicas"),
    ],
)
def test_the_plan_says_who_shares_what(workers: int, stage: int | str, line: str) -> None:
    plan = make_plan(config(cluster={"workers": workers}, engine={"zero_stage": stage}))
    assert any(line in each for each in format_plan(plan))


def test_the_advice_where_memory_is_short_is_not_refused() -> None:
    """ZeRO 3 and the offload of weights are no way out here."""
    given = config(
        model={"name": "qwen2.5-32b", "config_overrides": {}},
        train={"precision": "bf16", "micro_batch_size": 1},
        cluster={"workers": 2},
    )
    [problem] = estimate_on_cluster(given, make_plan(given), read_hardware(CLUSTER)).problems
    assert (problem.code, problem.where) == ("out-of-memory", KEY)
    assert "engine.offload: optimizer (into host memory)" in problem.fix
    assert "engine.zero_stage" not in problem.fix
    assert "optimizer_and_weights" not in problem.fix


@pytest.mark.parametrize(("workers", "wanted"), [(2, 0), (4, 1)])
def test_auto_shards_the_state_over_replicas_only(workers: int, wanted: int) -> None:
    """One replica has nothing to shard; several do where memory is short."""
    chosen = choose_memory_settings(config(cluster={"workers": workers}), workers, 1.0)
    assert chosen.settings.zero == wanted
