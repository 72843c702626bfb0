"""The tasks at the end of a run: whatever becomes of them, the run is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rank_tasks
from llm_training_toolkit.config.eval_config import EvalTaskConfig
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.in_training import InTrainingEvaluator
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.run_tasks import (
    DoneMarker,
    build_task_key,
    format_failure_reason,
    has_finished_tasks,
    run_final_tasks,
)
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory


def test_a_task_that_fails_in_a_way_nobody_foresaw_is_reported(fresh_run: Callable[[str], RunDirectory]) -> None:
    run = fresh_run("unforeseen")
    tokenizer = rank_tasks.build_worker_spec(str(run.path)).dataset_info.tokenizer_path
    shutil.copytree(tokenizer, run.export_dir)
    (run.export_dir / "training.json").write_text(json.dumps({"checkpoint": "step_000000009_a1"}))
    # Of the errors that loading foresees this one is none.
    (run.export_dir / "config.json").write_text('{"model_type": "qwen3", "num_hidden_layers": "two"}')
    spec = rank_tasks.build_worker_spec(str(run.path), {"eval": {"tasks": [{"task": "infill", "limit": 1}]}})
    said: list[str] = []
    context = RunContext(
        0, 1, torch.device("cpu"), event_listener=lambda event: said.append(getattr(event, "message", ""))
    )
    metrics = Metrics(run, 1, 0, context)
    run_final_tasks(spec, metrics=metrics, context=context)
    metrics.close()
    assert any(
        "infill was not evaluated: StrictDataclassFieldValidationError" in text and "ltt evaluate" in text
        for text in said
    )
    assert has_finished_tasks(run, spec.config)


def test_an_export_knows_its_run_from_within(
    fresh_run: Callable[[str], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run("within")
    run.export_dir.mkdir()
    (run.export_dir / "training.json").write_text(json.dumps({"checkpoint": "step_000000009_a1"}))
    (run.export_dir / "config.json").touch()
    monkeypatch.chdir(run.export_dir)
    origin = EvalModel(Path(), device="cpu").origin
    assert origin is not None
    assert (origin.directory.path, origin.step) == (run.path, 9)


def test_why_something_was_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert format_failure_reason(CheckpointError("no export")) == "no export"
    assert format_failure_reason(MemoryError()) == "memory ran out"
    assert capsys.readouterr().err == ""
    assert format_failure_reason(ValueError("odd")) == "ValueError: odd"
    assert "ValueError: odd" in capsys.readouterr().err


def test_tasks_that_end_their_process_are_not_begun_for_ever(tmp_path: Path) -> None:
    mark, other = (DoneMarker(tmp_path / "eval" / "at_step_4", what) for what in ("tasks", "other tasks"))
    assert [mark.record_attempt() for _ in range(3)] == [True, True, False]
    assert not mark.is_done
    assert other.record_attempt(), "they may do better"
    assert mark.record_attempt()
    mark.mark_done()
    assert (mark.is_done, other.is_done) == (True, False)


def test_tasks_that_were_not_wanted_any_more_count_as_never_begun(tmp_path: Path) -> None:
    mark = DoneMarker(tmp_path / "at_end", "tasks")
    for _ in range(4):
        assert mark.record_attempt()
        mark.clear_attempts()


def midway_of(run: RunDirectory, context: RunContext) -> InTrainingEvaluator:
    """What is due after step 4 of a run, whose checkpoint holds nothing that could be exported."""
    spec = rank_tasks.build_worker_spec(str(run.path), {"eval": {"tasks": [{"task": "perplexity", "interval": 4}]}})
    checkpoint = run.get_checkpoint_dir(4, 1)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").touch()
    return InTrainingEvaluator(spec, metrics=Metrics(run, 1, 0, context), context=context)


def test_ranks_that_are_gone_are_no_failure_of_a_task(fresh_run: Callable[[str], RunDirectory]) -> None:
    run = fresh_run("alone")
    said: list[Any] = []
    for _ in range(2):
        context = RunContext(0, 2, torch.device("cpu"), event_listener=said.append)  # of a group that does not exist
        with pytest.raises(ValueError, match="process group"):
            midway_of(run, context).run_due_tasks(4)
    assert said == []
    alone = RunContext(0, 1, torch.device("cpu"), event_listener=said.append)
    assert midway_of(run, alone).run_due_tasks(4) is StopRequest.NONE
    assert "2 times the process that began them was gone" in said[0].message
    assert midway_of(run, alone).run_due_tasks(4) is StopRequest.NONE
    assert len(said) == 1


@pytest.mark.parametrize("stop_request", [StopRequest.DRAIN_AFTER_CHECKPOINT, StopRequest.DRAIN, StopRequest.STOP])
def test_every_wish_to_end_breaks_the_tasks_off(
    stop_request: StopRequest, fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("not-now")
    context = RunContext(0, 1, torch.device("cpu"), stop_request_reader=lambda: stop_request)
    half = run.task_export_dir.with_name(".export_for_tasks.writing")
    half.mkdir()
    for _ in range(3):
        assert midway_of(run, context).run_due_tasks(4) is stop_request
    assert not half.exists(), "of an attempt that was killed"
    assert not (run.evaluations_dir / "at_step_4").exists()


def test_a_new_signature_makes_no_new_task() -> None:
    def key(signature: str) -> str:
        data = f"https://bucket.example/held-out.jsonl?X-Amz-Signature={signature}"
        return build_task_key("step_000000009_a1", [EvalTaskConfig(task="perplexity", data=data, format="text")])

    assert key("one") == key("two")
    assert "one" not in key("one")
