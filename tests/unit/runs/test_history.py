"""Metrics of several attempts are read as they count: each step once, from the attempt that led on."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.runs.history import build_history, read_history


def test_steps_done_again_count_once_and_rows_of_a_step_are_one(tmp_path: Path) -> None:
    rows = [
        {"step": 0, "attempt": 1, "eval/loss": 9.0},
        *({"step": step, "attempt": 1, "train/loss": 8.0 - step} for step in range(1, 7)),
        {"step": 6, "attempt": 1, "eval/loss": 2.5},
        {"step": 3, "attempt": 2, "eval/loss": 5.5},  # of the checkpoint that the attempt resumed from
        *({"step": step, "attempt": 2, "train/loss": 7.9 - step} for step in (4, 5)),
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('"no row"\n'.join(json.dumps(row) + "\n" for row in rows) + '{"step": 7, "atte')
    history = read_history(metrics)
    assert [(row["step"], row.get("train/loss")) for row in history.rows] == [
        *((0, None), (1, 7.0), (2, 6.0), (3, 5.0), (4, 3.9000000000000004), (5, 2.9000000000000004)),
    ]
    assert history.rows[3]["eval/loss"] == 5.5
    assert history.repeated_steps == 3
    assert history.columns == ("step", "attempt", "eval/loss", "train/loss")
    assert read_history(tmp_path / "absent").rows == ()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5))
def test_history_has_each_step_once_in_order(attempts: list[tuple[int, int]]) -> None:
    rows = [
        {"step": step, "attempt": number, "train/loss": 1.0}
        for number, (first, length) in enumerate(attempts, start=1)
        for step in range(first, first + length)
    ]
    history = build_history(rows)
    steps = [row["step"] for row in history.rows]
    assert steps == sorted(set(steps))
    assert len(history.training_rows) + history.repeated_steps == len(rows)
    if rows:
        assert history.rows[-1] == rows[-1]
