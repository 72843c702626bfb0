"""A run in a store knows its size by its own plan, before it is opened and without the hub."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import constants

from llm_training_toolkit.config import dump_config_json
from llm_training_toolkit.plan import make_plan
from llm_training_toolkit.runs.storage.open import get_run_location, open_worker
from llm_training_toolkit.setup.stored_plan import recall_stored_plan
from s3_server import s3_server
from tiny_models import DECODER
from unit.setup.test_hub_size import hub_config

pytestmark = pytest.mark.slow


def test_a_run_in_a_store_is_planned_with_the_size_that_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("staging")))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("empty")))
    config = hub_config()
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": "s3://bucket/runs"})})
    hf = {**DECODER, "vocab_size": 1024, "max_position_embeddings": 128}
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert recall_stored_plan(config) is config
        with open_worker(get_run_location(config), print) as run:
            run.resolved_config_path.write_text(dump_config_json(config))
            run.plan_path.write_text(json.dumps({"model": "My-Model", "family": "qwen3", "hf_config": hf}))
        plan = make_plan(recall_stored_plan(config))
    assert plan.problems == ()
    assert plan.hf_config["hidden_size"] == DECODER["hidden_size"]
