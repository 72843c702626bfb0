"""What this machine cannot compute is refused before data is prepared."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from llm_training_toolkit.commands.train import start_run
from llm_training_toolkit.errors import PlanError, Problem, ToolkitError
from llm_training_toolkit.launch.child import _build_error
from llm_training_toolkit.launch.request import TrainRequest, build_failure_json
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.setup.machine import find_attention_problem, find_compiler_problem
from tiny_runs import tiny_config, write_corpus


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_that_this_machine_lacks_is_refused_before_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    if find_attention_problem(attention, gpu=torch.cuda.is_available()) is None:
        pytest.skip(f"this machine computes {attention}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny_config(
        write_corpus(tmp_path / "corpus", 3),
        tmp_path / "runs",
        model={"attn_implementation": attention},
        data={"cache": str(tmp_path / "cache")},
        train={"precision": "bf16"},
        cluster={"workers": 0},
    )
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(json.loads(config.model_dump_json(exclude_unset=True))))
    with pytest.raises(PlanError, match=f"model.attn_implementation = {attention}: it needs"):
        start_run(TrainRequest(file), Console(io.StringIO()))
    assert not (tmp_path / "cache").exists()


def test_layers_that_this_machine_cannot_compile_are_refused_before_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "/no/such/compiler")
    config = tiny_config(
        write_corpus(tmp_path / "corpus", 3),
        tmp_path / "runs",
        model={"compile": True},
        data={"cache": str(tmp_path / "cache")},
        cluster={"workers": 0, "gpus_per_worker": 0},
    )
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(json.loads(config.model_dump_json(exclude_unset=True))))
    with pytest.raises(PlanError, match=r"model.compile = true: torch.compile needs a compiler, .*no/such/compiler"):
        start_run(TrainRequest(file), Console(io.StringIO()))
    assert not (tmp_path / "cache").exists()
    assert find_compiler_problem(gpu=True) is not None


def test_a_failure_is_json_from_which_its_exception_is_built_again() -> None:
    problem = Problem("too-many-workers", "cluster.workers", "9 workers share 4 sequences", "Use 4")
    failed = build_failure_json(PlanError.from_problems(str(problem), [problem]))
    with pytest.raises(PlanError) as caught:
        raise _build_error(json.loads(json.dumps(failed)))
    assert caught.value.problems == (problem,)
    full = OSError(28, "No space left on device", "runs/a")
    again = _build_error(build_failure_json(full))
    assert type(again) is ToolkitError
    assert "runs/a" in str(again)
    assert [each.code for each in again.problems] == ["failed"]
