"""The micro-batch from the memory of a device, and the next one after an out-of-memory."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config import Config, parse_config
from llm_training_toolkit.plan import (
    find_fitting_micro_batch,
    find_smaller_micro_batch,
    format_plan,
    make_plan,
    with_micro_batch,
    with_precision,
    with_zero_stage,
)


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
    return 1e9 * sum(make_plan(with_micro_batch(made, rows), replicas=replicas).memory_gb_per_device.values())


@given(global_batch=st.integers(1, 64), replicas=st.integers(1, 8), gigabytes=st.floats(0.1, 200))
def test_the_largest_that_fits_is_taken(global_batch: int, replicas: int, gigabytes: float) -> None:
    replicas = min(replicas, global_batch)
    made, free = config(global_batch), gigabytes * 1e9
    rows = find_fitting_micro_batch(made, replicas, free)
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
    chosen = with_precision(with_zero_stage(with_micro_batch(config(), 8), 2), "fp32")
    assert make_plan(chosen).estimated == ("memory_gb_per_device",)


@pytest.mark.parametrize("value", ["Auto", 0, 1.5, True, "8"])
def test_other_words_and_numbers_are_refused(value: object) -> None:
    from llm_training_toolkit.errors import ConfigError

    data = config().model_dump(mode="json")
    data["train"]["micro_batch_size"] = value
    with pytest.raises(ConfigError, match="micro_batch"):
        parse_config(data, "test")
