"""Activation checkpointing, micro-batch and ZeRO stage from the memory of a device, and the next after an OOM."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit import families
from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.plan import (
    MemorySettings,
    choose_memory_settings,
    find_smaller_micro_batch,
    find_smaller_settings,
    format_plan,
    make_plan,
    plan_workload,
    with_micro_batch,
    with_precision,
    with_zero_stage,
)
from llm_training_toolkit.plan.memory.activations import ActivationCheckpointing, count_recomputed_flops


def config(global_batch: int = 64, **model: Any) -> Config:
    """A run of a 0.6B model with sequences of 1,024 tokens."""
    return parse_config(
        {
            "run": {"name": "a"},
            "model": {"name": "qwen3-0.6b", **model},
            "tokenizer": {"path": "somewhere"},
            "data": {"sequence_length": 1024, "sources": [{"path": "a", "format": "code"}]},
            "train": {"steps": 10, "global_batch_size": global_batch},
        },
        "test",
    )


def needed(made: Config, rows: int, replicas: int) -> float:
    return 1e9 * sum(make_plan(with_micro_batch(made, rows), ranks=replicas).memory_gb_per_device.values())


@given(global_batch=st.integers(1, 64), replicas=st.integers(1, 8), gigabytes=st.floats(0.1, 200))
def test_the_largest_that_fits_is_taken(global_batch: int, replicas: int, gigabytes: float) -> None:
    replicas = min(replicas, global_batch)
    made, free = with_zero_stage(config(global_batch, activation_checkpointing="full"), 2), gigabytes * 1e9
    rows = choose_memory_settings(made, replicas, free).settings.micro_batch
    share = -(-global_batch // replicas)
    assert 1 <= rows <= share
    assert rows == 1 or needed(made, rows, replicas) <= 0.9 * free
    passes = -(-share // rows)
    if passes > 1:  # one pass less would not fit
        assert needed(made, -(-share // (passes - 1)), replicas) > 0.9 * free


@given(global_batch=st.integers(1, 200), rows=st.integers(1, 200))
def test_the_next_one_is_at_most_half_and_the_last_one_is_one(global_batch: int, rows: int) -> None:
    tried = [min(rows, global_batch)]
    while after := find_smaller_micro_batch(config(global_batch), 1, tried[-1]):
        assert after <= tried[-1] / 2
        tried.append(after)
    assert tried[-1] == 1


def test_a_plan_without_a_device_says_that_the_micro_batch_is_open() -> None:
    made = make_plan(config())
    assert made.micro_batch == 1
    assert {"micro_batch", "accumulation"} <= set(made.estimated)
    assert any("as large as memory allows" in line for line in format_plan(made))
    chosen = with_precision(MemorySettings("none", 8, 2).apply_to_config(config()), "fp32")
    assert make_plan(chosen).estimated == ("compile", "memory_gb_per_device")


@pytest.mark.parametrize("value", ["Auto", 0, 1.5, True, "8"])
def test_other_words_and_numbers_are_refused(value: object) -> None:
    from llm_training_toolkit.errors import ConfigError

    data = config().model_dump(mode="json")
    data["train"]["micro_batch_size"] = value
    with pytest.raises(ConfigError, match="micro_batch"):
        parse_config(data, "test")


LORA = {"rank": 64, "alpha": 16, "dropout": 0.05}
RECIPES: dict[str, tuple[dict[str, Any], int]] = {
    "1.5B on one": ({"name": "qwen2.5-1.5b"}, 1),
    "7B with adapters on one": ({"name": "qwen2.5-7b", "path": "x", "lora": LORA}, 1),
    "7B on eight": ({"name": "qwen2.5-7b"}, 8),
    "32B with adapters on four": ({"name": "qwen2.5-32b", "path": "x", "lora": LORA}, 4),
}
"""Fields of `model`, and workers."""


def recipe(name: str, sequence_length: int = 4096) -> tuple[Config, int]:
    model, workers = RECIPES[name]
    made = config(32, **model)
    data = made.data.model_copy(update={"sequence_length": sequence_length})
    return made.model_copy(update={"data": data}), workers


@pytest.mark.parametrize("gigabytes", [24, 48, 80, 141])
@pytest.mark.parametrize("name", RECIPES)
def test_no_faster_combination_fits(name: str, gigabytes: int) -> None:
    made, workers = recipe(name)
    choice = choose_memory_settings(made, workers, 1e9 * gigabytes)
    flops = _recomputed_flops(made)

    def slowness(settings: MemorySettings) -> tuple[float, bool, int, int, int]:
        is_short = min(settings.micro_batch * made.data.sequence_length, 4096)
        return flops[settings.checkpointing], settings.zero > 1, -is_short, settings.zero, -settings.micro_batch

    needs = {
        settings: sum(make_plan(settings.apply_to_config(made), ranks=workers).memory_gb_per_device.values())
        for kind in flops
        for rows in {-(-(32 // workers) // passes) for passes in range(1, 33)}
        for stage in ((0,) if workers == 1 else (0, 1, 2, 3))
        for settings in [MemorySettings(kind, rows, stage)]
    }
    fitting = [settings for settings, size in needs.items() if size <= 0.9 * gigabytes]
    wanted = min(fitting, key=slowness) if fitting else min(needs, key=lambda each: (needs[each], slowness(each)))
    assert choice.settings == wanted


def _recomputed_flops(made: Config) -> dict[ActivationCheckpointing, float]:
    hf = families.resolve_hf_config(made)
    model, adapter = families.read_model_dims(hf), families.resolve_adapter(made, hf)
    forward = families.compute_flops_per_token(hf, made.data.sequence_length) / 3
    kinds: tuple[ActivationCheckpointing, ...] = ("full", "none", "selective")
    return {kind: count_recomputed_flops(kind, model, adapter, forward) for kind in kinds}


def test_given_values_are_kept_and_the_reason_names_what_less_recomputation_needs() -> None:
    made, workers = recipe("7B on eight", 16384)
    choice = choose_memory_settings(MemorySettings("none", 1, 2).apply_to_config(made), workers, 80e9)
    assert (choice.settings, choice.reasons) == (MemorySettings("none", 1, 2), ())
    choice = choose_memory_settings(with_zero_stage(made, 2), workers, 80e9)
    assert choice.settings.zero == 2
    least = needed(MemorySettings("none", 1, 2).apply_to_config(made), 1, workers) / 1e9
    assert choice.settings.checkpointing != "none"
    assert f"none needs {least:.3g} GB" in str(choice.reasons[0])
    assert [reason.key for reason in choice.reasons] == ["model.activation_checkpointing", "train.micro_batch_size"]


def test_what_follows_an_out_of_memory_takes_less_memory() -> None:
    small = config(2).model_copy(update={"data": config(2).data.model_copy(update={"sequence_length": 2048})})
    tried = MemorySettings("none", 1, 2)
    following = find_smaller_settings(small, tried, 2)
    assert following is not None
    assert following.estimate_bytes(plan_workload(small, 2)) < tried.estimate_bytes(plan_workload(small, 2))


@given(kind=st.sampled_from(["none", "selective", "full"]), rows=st.integers(1, 64), workers=st.integers(1, 4))
def test_the_settings_after_an_out_of_memory_come_to_an_end(
    kind: ActivationCheckpointing, rows: int, workers: int
) -> None:
    seen = [MemorySettings(kind, min(rows, 64 // workers), 0)]
    while (following := find_smaller_settings(config(), seen[-1], workers)) is not None:
        assert following not in seen
        seen.append(following)
    load = plan_workload(config(), workers)
    needs = [settings.estimate_bytes(load) for settings in seen]
    assert needs == sorted(needs, reverse=True)
    assert seen[-1].micro_batch == 1
    assert needs[-1] <= replace(seen[-1], checkpointing="full").estimate_bytes(load)
