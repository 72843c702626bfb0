"""Weights and tokenizers that do not fit end a start before a document is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from checkpoints import build_manifest
from llm_training_toolkit import families
from llm_training_toolkit.config import Config
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.data.tokenizer import TokenizationSpec, train_tokenizer
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.setup.resume import ResumeState
from llm_training_toolkit.setup.weights import check_initial_weights
from tiny_runs import tiny_config
from unit.models.test_check_weights import QWEN3, published

FRESH = ResumeState(None, None, None)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of 298 entries."""
    (tmp_path / "tokenizer").mkdir()
    markers = TokenizationSpec.from_family(families.FAMILIES["qwen3"])
    train_tokenizer(
        ["def f(x): return x\n" * 40 + "lambda while yield import"] * 3, 300, markers, tmp_path / "tokenizer"
    )
    return tmp_path / "tokenizer"


def starting_from(path: Path, corpus: Path, runs: Path, **model: Any) -> Config:
    given = {"path": str(path), "config_overrides": {}} | model
    return tiny_config(corpus, runs, model=given, tokenizer={"path": "x/y", "train": None})


def test_weights_that_fit_are_taken(corpus: Path, tmp_path: Path) -> None:
    published(QWEN3, tmp_path / "w")
    config = starting_from(tmp_path / "w", corpus, tmp_path)
    check_initial_weights(config, make_plan(config), FRESH)


def test_a_missing_weight_is_named(corpus: Path, tmp_path: Path) -> None:
    published(QWEN3, tmp_path / "w")
    tensors = load_file(tmp_path / "w" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "w" / "model.safetensors", metadata={"format": "pt"})
    config = starting_from(tmp_path / "w", corpus, tmp_path)
    with pytest.raises(CheckpointError, match=r"missing_keys: model\.layers\.1\.mlp\.up_proj\.weight"):
        check_initial_weights(config, make_plan(config), FRESH)


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of `tiny/model` as the hub's client keeps what it has fetched, with no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--tiny--model" / "snapshots" / ("0" * 40)
    (tmp_path / "models--tiny--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--tiny--model" / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot / "config.json"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2.5-0.5b", None),
        ("qwen2.5-1.5b", r"tiny/model holds a model of 494,[0-9,]+ parameters, qwen2\.5-1\.5b has 1,543,"),
        ("qwen3-0.6b", r"tiny/model holds a qwen2 model, model\.name is of qwen3"),
    ],
)
def test_a_hub_id_of_another_size_or_family_than_was_planned_is_refused(
    corpus: Path, tmp_path: Path, fetched: Path, name: str, message: str | None
) -> None:
    given = starting_from(Path("tiny/model"), corpus, tmp_path, name="qwen2.5-0.5b", resize_vocab_to=152_000)
    config = given.model_copy(update={"model": given.model.model_copy(update={"name": name})})
    plan = make_plan(config)  # while the hub cannot be asked: of the size with this name
    fetched.write_text(
        json.dumps(families.resolve_hf_config(starting_from(Path("a/b"), corpus, tmp_path, name="qwen2.5-0.5b")))
    )
    if message is None:
        check_initial_weights(config, plan, FRESH)
        return
    with pytest.raises(PlanError, match=message):
        check_initial_weights(config, plan, FRESH)


def test_a_directory_that_is_not_there_is_named(corpus: Path, tmp_path: Path) -> None:
    config = starting_from(tmp_path / "w", corpus, tmp_path)
    with pytest.raises(PlanError, match=r"model\.path = .*/w: there is no such directory"):
        check_initial_weights(config, make_plan(config), FRESH)


def test_a_begun_run_needs_them_no_more_unless_it_has_adapters(corpus: Path, tmp_path: Path) -> None:
    begun = ResumeState(build_manifest(), None, None)
    config = starting_from(tmp_path / "w", corpus, tmp_path)
    check_initial_weights(config, make_plan(config), begun)
    config = starting_from(tmp_path / "w", corpus, tmp_path, lora={})
    with pytest.raises(PlanError, match="there is no such directory"):
        check_initial_weights(config, make_plan(config), begun)


def test_ids_outside_the_vocabulary_are_refused_before_a_document_is_read(
    corpus: Path, tmp_path: Path, tokenizer: Path
) -> None:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 288}
    given = {"path": str(tokenizer), "train": None}
    config = tiny_config(corpus, tmp_path, model={"config_overrides": shape}, tokenizer=given)
    stages: list[str] = []
    with pytest.raises(PlanError, match=r"tokenizer has 298 entries, the model's embedding 288 rows.*vocab_size=320"):
        prepare_run_data(config, lambda stage, _done, _total: stages.append(stage))
    assert stages == []
    assert not (tmp_path / ".cache").exists()
    shape["vocab_size"] = 320
    prepare_run_data(tiny_config(corpus, tmp_path, model={"config_overrides": shape}, tokenizer=given), lambda *_: None)
