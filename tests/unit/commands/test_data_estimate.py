"""The length of a run over epochs before its data is prepared."""

from __future__ import annotations

import gzip
from pathlib import Path

from llm_training_toolkit.commands.data_estimate import BYTES_PER_TOKEN, estimate_data_facts
from llm_training_toolkit.commands.plan import plan_run
from llm_training_toolkit.config import Config, parse_config


def config_of(path: Path | str, **train: int) -> Config:
    return parse_config(
        {
            "run": {"name": "a", "dir": "nowhere"},
            "model": {"name": "qwen3-0.6b"},
            "tokenizer": {"path": "a"},
            "data": {"sequence_length": 64, "sources": [{"path": str(path), "format": "code"}]},
            "train": {"global_batch_size": 4, "precision": "fp32", **train},
        },
        "test",
    )


def test_epochs_are_estimated_by_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x" * 70_000)
    (tmp_path / "b.py").write_bytes(b"x" * 42_000)
    plan, _ = plan_run(config_of(tmp_path, epochs=2))
    sequences = round(112_000 / BYTES_PER_TOKEN / 64)
    assert plan.steps == -(-2 * sequences // 4)
    assert "steps" in plan.estimated
    assert any("32,000 tokens an epoch" in note for note in plan.notes)
    one, _ = plan_run(config_of(tmp_path, epochs=1))
    assert "steps" in one.estimated
    exact, _ = plan_run(config_of(tmp_path, steps=3))
    assert "steps" not in exact.estimated


def test_nothing_is_estimated_where_bytes_say_little(tmp_path: Path) -> None:
    (tmp_path / "a.py.gz").write_bytes(gzip.compress(b"x = 1"))
    for path in (tmp_path, tmp_path / "absent", "s3://bucket/code", "owner/name"):
        assert estimate_data_facts(config_of(path, epochs=1)) is None
    plan, _ = plan_run(config_of(tmp_path, epochs=1))
    assert plan.steps is None
