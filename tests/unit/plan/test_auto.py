"""What `auto` becomes, from measurements and memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.plan import (
    choose_memory_settings,
    choose_precision,
    format_slow_precision,
    make_plan,
    suggest_partitions,
    with_zero_stage,
)
from llm_training_toolkit.plan.forecast.cluster_estimate import resolve_for_hardware
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

ROOT = Path(__file__).parents[3]


def config(**sections: dict[str, Any]) -> Config:
    data: dict[str, Any] = {
        "run": {"name": "auto"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "x"},
        "data": {"sequence_length": 1024, "sources": [{"path": "x", "format": "text"}]},
        "train": {"steps": 10, "global_batch_size": 16, "micro_batch_size": 2},
        "cluster": {"workers": 2},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return parse_config(data, "test")


@pytest.mark.parametrize(
    ("slowdowns", "device", "precision", "reason"),
    [
        ([0.2], "cpu", "bf16", "bf16 is 5 times faster than fp32 on this CPU"),
        ([1.0], "cpu", "bf16", "bf16 is 1 times slower than fp32 on this CPU"),
        ([1.1], "cpu", "fp32", "bf16 is 1.1 times slower than fp32 on this CPU"),
        ([25.0], "cpu", "fp32", "bf16 is 25 times slower than fp32 on this CPU"),
        ([0.2, 25.0, 0.2], "cpu", "fp32", "bf16 is 25 times slower than fp32 on the slowest worker's CPU"),
        ([0.0, 0.0], "cuda", "bf16", "the GPUs compute in bf16"),
        ([0.0, math.inf], "cuda", "fp32", "not every GPU computes in bf16"),
    ],
)
def test_the_slowest_worker_decides_the_precision(
    slowdowns: list[float], device: str, precision: str, reason: str
) -> None:
    chosen = choose_precision(slowdowns, device)
    assert (chosen.key, chosen.value, chosen.reason) == ("train.precision", precision, reason)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8))
def test_ranks_agree_whatever_their_order(slowdowns: list[float]) -> None:
    assert choose_precision(slowdowns, "cpu") == choose_precision(slowdowns[::-1], "cpu")


def test_a_run_that_keeps_a_slow_precision_says_so() -> None:
    assert "19 times slower" in (format_slow_precision("bf16", [0.5, 19.0]) or "")
    assert format_slow_precision("bf16", [0.5]) is None
    assert format_slow_precision("fp32", [19.0]) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_worker_takes_the_stage_that_costs_least(precision: str) -> None:
    alone = config(cluster={"workers": 1}, train={"precision": precision})
    assert choose_memory_settings(alone, 1, 1e15).settings.zero == 0
    assert choose_memory_settings(alone, 1, 1.0).settings.zero == 0, "no other stage takes less memory of one worker"
    assert make_plan(alone).zero == 0


@given(st.floats(1e8, 1e12), st.integers(2, 8), st.sampled_from(["fp32", "bf16"]))
def test_several_workers_take_the_lowest_stage_that_fits(free: float, workers: int, precision: str) -> None:
    model = {"activation_checkpointing": "none"}
    run = config(model=model, train={"precision": precision}, cluster={"workers": workers})
    chosen = choose_memory_settings(run, workers, free).settings.zero

    def needed(stage: int) -> float:
        return 1e9 * sum(make_plan(with_zero_stage(run, stage), ranks=workers).memory_gb_per_device.values())

    least = min(needed(stage) for stage in range(4))
    assert needed(chosen) <= 0.9 * free or needed(chosen) == least > 0.9 * free
    assert needed(chosen) == least or all(needed(stage) > 0.9 * free for stage in range(chosen))


def test_weights_in_four_bits_are_not_cut() -> None:
    quantized = config(model={"name": "qwen3-0.6b", "path": "x", "lora": {"quantize": "nf4"}})
    assert choose_memory_settings(quantized, 2, 1.0).settings.zero < 3


def test_a_cluster_file_decides_both() -> None:
    gpus = read_hardware(ROOT / "cluster" / "aws-h100.yaml")
    large = config(model={"name": "qwen3-32b"}, train={"micro_batch_size": 1}, cluster={"workers": 16})
    settled, reasons = resolve_for_hardware(large, gpus)
    assert settled.train.precision == "bf16"
    assert settled.engine.zero_stage == 3
    assert settled.model.activation_checkpointing == "selective"
    assert [reason.split(" =")[0] for reason in reasons] == ["model.activation_checkpointing", "engine.zero_stage"]
    slow = gpus.model_copy(update={"tflops": gpus.tflops.model_copy(update={"bf16": 0.01})})
    assert resolve_for_hardware(large, slow)[0].train.precision == "fp32"


def test_a_plan_without_a_machine_says_what_is_open() -> None:
    plan = make_plan(config())
    assert {"precision", "zero", "activation_checkpointing"} <= set(plan.estimated)
    assert (plan.precision, plan.zero, plan.activation_checkpointing) == ("bf16", 0, "none")


GIB = 1 << 30
REPOSITORIES = {"path": "x", "format": "code", "group_by": "repository", "metadata": True}


@pytest.mark.parametrize(
    ("size", "partitions", "sections"),
    [
        (0, None, {}),
        (4 * GIB - 1, None, {}),
        (4 * GIB, 2, {}),
        (100 * GIB, 50, {}),
        (10**18, 10_000, {}),
        (100 * GIB, None, {"train": {"steps": None, "epochs": 2}}),
        (100 * GIB, None, {"data": {"sources": [REPOSITORIES]}}),
        (100 * GIB, None, {"data": {"partitions": 3}}),
        (100 * GIB, None, {"data": {"partitions": 1}}),
    ],
)
def test_partitions_are_suggested_by_the_size_of_the_sources(
    size: int, partitions: int | None, sections: dict[str, dict[str, Any]]
) -> None:
    note = suggest_partitions(config(**sections), size)
    assert (note is None) == (partitions is None)
    assert partitions is None or f"data.partitions: {partitions} " in str(note)
