"""What `ltt tune` refuses before anything starts."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.launch.tune.tuner import read_search, run_search
from llm_training_toolkit.monitoring.console import Console


def test_a_winner_that_the_base_could_not_take_is_refused_before_the_trials(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.py").write_text("print(1)\n")
    base = {
        "run": {"name": "base", "dir": str(tmp_path / "runs")},
        "model": {"name": "qwen3-0.6b", "config_overrides": {"num_hidden_layers": 1}},
        "tokenizer": {"train": {"vocab_size": 512}},
        "data": {
            "sequence_length": 64,
            "sources": [{"path": str(corpus), "format": "code"}],
            "eval": {"fraction": 0.1},
        },
        "train": {"epochs": 1, "global_batch_size": 4},
        "cluster": {"workers": 1},
    }
    search = {
        "base": "base.yaml",
        "overrides": {"train.steps": 16},
        "search": {"data.sources.0.weight": [1, 2]},
        "trials": 2,
    }
    for name, content in (("base", base), ("find", search)):
        with (tmp_path / f"{name}.yaml").open("w") as file:
            YAML().dump(content, file)
    with pytest.raises(
        ConfigError, match=r"best\.yaml \(the base without overrides\) with data\.sources\.0\.weight = 1"
    ):
        run_search(read_search(tmp_path / "find.yaml", []), Console(io.StringIO()))
    assert not (tmp_path / "runs").exists()
