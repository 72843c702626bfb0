"""Rows that ranks cannot share are refused before anything starts, with a code and what works instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import Plan, choose_attention, make_plan
from llm_training_toolkit.plan.plan import check_plan
from tiny_runs import tiny_config

NOWHERE = Path("nowhere")


def config(**sections: dict[str, Any]) -> Config:
    """Two workers that share rows, and two key-value heads."""
    return tiny_config(NOWHERE, NOWHERE, **{"engine": {"sequence_parallel": 2}, **sections})


def codes(plan: Plan) -> dict[str, str]:
    """Keys of the problems by their codes."""
    return {problem.code: problem.where for problem in plan.problems}


REFUSED: list[tuple[dict[str, dict[str, Any]], str, str]] = [
    ({"cluster": {"workers": 3}}, "sequence-parallel-workers", "cluster.workers"),
    ({"cluster": {"workers": [2, 5]}}, "sequence-parallel-workers", "cluster.workers"),
    ({"cluster": {"workers": [1, 4]}}, "sequence-parallel-workers", "cluster.workers"),
    (
        {"engine": {"sequence_parallel": 4}, "cluster": {"workers": 4}},
        "sequence-parallel-heads",
        "engine.sequence_parallel",
    ),
    ({"data": {"sequence_length": 65}}, "sequence-parallel-length", "data.sequence_length"),
    (
        {"model": {"name": "qwen3.5-4b", "config_overrides": {}}},
        "sequence-parallel-linear-attention",
        "engine.sequence_parallel",
    ),
    ({"model": {"attn_implementation": "sdpa"}}, "sequence-parallel-attention", "model.attn_implementation"),
    ({"model": {"lora": {"dropout": 0.1}}}, "sequence-parallel-dropout", "model.lora.dropout"),
    (
        {
            "model": {"lora": {"quantize": "nf4"}},
            "cluster": {"gpus_per_worker": 1},
            "train": {"precision": "bf16"},
            "engine": {"zero_stage": 2, "sequence_parallel": 2},
        },
        "sequence-parallel-quantize",
        "model.lora.quantize",
    ),
    (
        {
            "model": {"name": "qwen3-30b-a3b", "config_overrides": {}},
            "train": {"router_balance": 0.1},
        },
        "sequence-parallel-router-balance",
        "train.router_balance",
    ),
    (
        {"run": {"deterministic": True}, "cluster": {"gpus_per_worker": 1}, "train": {"precision": "bf16"}},
        "sequence-parallel-deterministic",
        "run.deterministic",
    ),
    ({"model": {"compile": True}}, "not-compiled", "model.compile"),
    ({"train": {"global_batch_size": 1}, "cluster": {"workers": 4}}, "more-workers-than-sequences", "cluster.workers"),
    (
        {"engine": {"sequence_parallel": 2, "deepspeed": {"sequence_parallel_size": 2}}},
        "deepspeed-owned-key",
        "engine.deepspeed.sequence_parallel_size",
    ),
]


@pytest.mark.parametrize(("sections", "code", "where"), REFUSED)
def test_it_is_refused(sections: dict[str, dict[str, Any]], code: str, where: str) -> None:
    plan = make_plan(config(**sections))
    assert codes(plan) == {code: where}
    with pytest.raises(PlanError):
        check_plan(plan)


@pytest.mark.parametrize(("gpus", "attention"), [(0, "auto"), ("auto", "auto"), (1, "varlen")])
def test_deterministic_kernels_are_refused_where_auto_would_take_varlen_on_gpus(gpus: Any, attention: str) -> None:
    sections: dict[str, dict[str, Any]] = {
        "run": {"deterministic": True},
        "cluster": {"gpus_per_worker": gpus},
        "train": {"precision": "bf16"},
        "model": {"attn_implementation": attention},
    }
    assert codes(make_plan(config(**sections))) == {}


def test_the_message_names_what_works_instead() -> None:
    [problem] = make_plan(config(engine={"sequence_parallel": 4}, cluster={"workers": 4})).problems
    assert "4 query heads and 2 key-value heads" in problem.what
    assert problem.fix == "Use 1 or 2"


def test_replicas_divide_the_batch_and_all_workers_the_state() -> None:
    plan = make_plan(config(cluster={"workers": [2, 6]}, engine={"sequence_parallel": 2, "zero_stage": 3}))
    assert plan.problems == ()
    assert (plan.ranks, plan.replicas, plan.split_batch()) == (6, 3, (4, 4, 3))
    assert plan.to_json()["accumulation"] == {"2": 6, "4": 3, "6": 2, "8": 2}
    alone = make_plan(config(cluster={"workers": [2, 6]}, engine={"zero_stage": 3}))
    parts, whole = plan.memory_gb_per_device, alone.memory_gb_per_device
    assert parts["weights"] == whole["weights"]
    assert parts["activations"] < 0.6 * whole["activations"]


def test_without_ray_the_ranks_that_were_started_count() -> None:
    assert make_plan(config(cluster={"workers": 0})).problems == ()
    assert codes(make_plan(config(cluster={"workers": 0}), ranks=1)) == {"sequence-parallel-workers": "cluster.workers"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_is_varlen_or_an_error(*, deterministic: bool) -> None:
    options: dict[str, Any] = {"has_flash": True, "deterministic": deterministic, "sequence_parallel": 2}
    assert choose_attention("fp32", 64, "cpu", **options).value == "varlen"
    if deterministic:
        with pytest.raises(PlanError, match="deterministic"):
            choose_attention("bf16", 64, "cuda", **options)
    else:
        assert choose_attention("bf16", 64, "cuda", **options).value == "varlen"
