"""What `ltt tune` refuses before anything starts."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from ruamel.yaml import YAML

from hub_server import hub, use_hub
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.launch.tune.tuner import read_search, run_search
from llm_training_toolkit.monitoring.console import Console
from tiny_models import DECODER


@pytest.fixture
def hub_of_a_known_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The id of weights that have the name of a known size and other dimensions."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    values = DECODER | {"vocab_size": 1024, "max_position_embeddings": 128}
    files = {"config.json": json.dumps(values).encode(), "model.safetensors": b"weights"}
    with hub("someone/qwen3-0.6b", files, "models") as endpoint:
        use_hub(endpoint, monkeypatch)
        yield "someone/qwen3-0.6b"


def write_search(folder: Path, base: dict[str, Any]) -> Path:
    """Write a base of epochs, and a search over weights of sources, which such a base cannot take."""
    search = {
        "base": "base.yaml",
        "overrides": {"train.steps": 16},
        "search": {"data.sources.0.weight": [1, 2]},
        "trials": 2,
    }
    for name, content in (("base", base), ("find", search)):
        with (folder / f"{name}.yaml").open("w") as file:
            YAML().dump(content, file)
    return folder / "find.yaml"


def test_trials_are_planned_with_the_dimensions_of_the_weights_also_under_a_known_name(
    tmp_path: Path, hub_of_a_known_name: str
) -> None:
    base = {
        "run": {"name": "base", "dir": str(tmp_path / "runs")},
        "model": {"path": hub_of_a_known_name, "lora": {"rank": 4}},
        "data": {"sequence_length": 64, "sources": [{"path": "x", "format": "text"}], "eval": {"fraction": 0.1}},
        "train": {"epochs": 1, "global_batch_size": 4},
        "cluster": {"workers": 1},
    }
    # The base, which has epochs, cannot take weights: that ends the search after its space is checked.
    file = write_search(tmp_path, base)
    spec = read_search(file, [])
    assert spec.trials.plan_trial({}).hf_config["hidden_size"] == 1024
    with pytest.raises(ConfigError, match=r"best\.yaml"):
        run_search(spec, Console(io.StringIO()))
    assert spec.trials.plan_trial({}).hf_config["hidden_size"] == DECODER["hidden_size"]


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
    file = write_search(tmp_path, base)
    with pytest.raises(
        ConfigError, match=r"best\.yaml \(the base without overrides\) with data\.sources\.0\.weight = 1"
    ):
        run_search(read_search(file, []), Console(io.StringIO()))
    assert not (tmp_path / "runs").exists()
