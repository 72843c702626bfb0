"""Settings that trackers show to a team."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.config import parse_config
from llm_training_toolkit.monitoring.trackers import read_settings


def test_settings_have_no_key(tmp_path: Path) -> None:
    raw = {
        "run": {"name": "x", "dir": str(tmp_path)},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "somewhere"},
        "data": {
            "sequence_length": 64,
            "sources": [{"path": "https://host/a.jsonl?sig=SECRET", "format": "text"}],
        },
        "train": {"steps": 1, "global_batch_size": 8},
        "cluster": {"workers": 1, "env": {"WANDB_API_KEY": "SECRET"}},
    }
    settings = read_settings(parse_config(raw, "test"))
    assert settings["train.global_batch_size"] == 8
    assert "SECRET" not in str(settings)
