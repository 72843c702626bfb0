"""`ltt init`: each kind gives a file that loads and plans, sized for the machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_training_toolkit.commands.init import (
    StarterKind,
    StarterRequest,
    TrainingMachine,
    format_starter_config,
    format_starter_search,
)
from llm_training_toolkit.config import Config, load_config
from llm_training_toolkit.config.search import load_search
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.plan import make_plan
from tiny_models import DECODER

LAPTOP, NODE = TrainingMachine(0, 16.0), TrainingMachine(8, 85.9)


def written(folder: Path, request: StarterRequest, machine: TrainingMachine) -> Config:
    path = folder / "run.yaml"
    path.write_text(format_starter_config(request, machine))
    return load_config(path)


@pytest.mark.parametrize("machine", [LAPTOP, NODE], ids=["laptop", "node"])
@pytest.mark.parametrize(
    "model", ["Qwen/Qwen3-0.6B", "bigcode/starcoder2-3b", "Qwen/Qwen2.5-Coder-7B", "Qwen/Qwen2-0.5B"]
)
@pytest.mark.parametrize("kind", ["chat", "code", "text", "scratch"])
def test_every_kind_loads_and_plans(tmp_path: Path, kind: StarterKind, model: str, machine: TrainingMachine) -> None:
    config = written(tmp_path, StarterRequest(kind, model, 'my "data"/*.jsonl'), machine)
    plan = make_plan(config)
    assert plan.problems == ()
    assert config.data.sources[0].path == 'my "data"/*.jsonl'
    assert config.cluster.workers == max(machine.gpus, 1)
    if config.model.path is not None:
        fits = sum(plan.memory_gb_per_device.values()) <= machine.memory_gb
        assert fits or config.model.lora is not None


def test_method_follows_from_memory(tmp_path: Path) -> None:
    request = StarterRequest("chat", "Qwen/Qwen2.5-7B", "chats.jsonl")
    assert written(tmp_path, request, TrainingMachine(1, 24.0)).model.lora is not None
    assert written(tmp_path, request, TrainingMachine(1, 300.0)).model.lora is None


def test_a_run_from_an_export_is_named_after_its_run(tmp_path: Path) -> None:
    export = tmp_path / "my-base" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text(json.dumps(DECODER | {"vocab_size": 512, "max_position_embeddings": 1024}))
    assert written(tmp_path, StarterRequest("chat", str(export), "chats.jsonl"), LAPTOP).run.name == "my-base-chat"


def test_size_without_weights_is_refused() -> None:
    with pytest.raises(PlanError, match="no hub id"):
        format_starter_config(StarterRequest("chat", "qwen3-0.6b", "x"), LAPTOP)


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"qwen3-0\.6b"):
        format_starter_config(StarterRequest("chat", "Qwen/Qwen3-0.6X", "x"), LAPTOP)


def test_search_is_one_of_its_base(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(format_starter_config(StarterRequest("scratch", "qwen3-0.6b", "x"), LAPTOP))
    (tmp_path / "search.yaml").write_text(format_starter_search("run.yaml"))
    search = load_search(tmp_path / "search.yaml", ())
    assert "optim.lr" in str(search)
