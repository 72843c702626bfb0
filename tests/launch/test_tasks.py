"""The tasks at the end of a run: whatever becomes of them, the run is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rank_tasks
from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.launch.exporting import Trained
from llm_training_toolkit.launch.tasks import are_carried_out, carry_out, reason
from llm_training_toolkit.metrics import Metrics
from llm_training_toolkit.runs import RunDirectory


def test_a_task_that_fails_in_a_way_nobody_foresaw_is_reported(fresh_run: Callable[[str], RunDirectory]) -> None:
    run = fresh_run("unforeseen")
    tokenizer = rank_tasks.place_of(str(run.path)).receipt.tokenizer_path
    shutil.copytree(tokenizer, run.export)
    (run.export / "training.json").write_text(json.dumps({"checkpoint": "step_000000009_a1"}))
    (run.export / "config.json").write_text("{")  # transformers raises OSError
    place = rank_tasks.place_of(str(run.path), {"eval": {"tasks": [{"task": "infill", "limit": 1}]}})
    said: list[str] = []
    context = RunContext(0, 1, torch.device("cpu"), report=lambda event: said.append(event["message"]))
    metrics = Metrics(run, 1, 0, context)
    carry_out(Trained(run, place.config, place.receipt), metrics=metrics, context=context)
    metrics.close()
    assert any("infill was not evaluated: OSError" in text and "ltt evaluate" in text for text in said)
    assert are_carried_out(run, place.config)


def test_an_export_knows_its_run_from_within(
    fresh_run: Callable[[str], RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fresh_run("within")
    run.export.mkdir()
    (run.export / "training.json").write_text(json.dumps({"checkpoint": "step_000000009_a1"}))
    (run.export / "config.json").touch()
    monkeypatch.chdir(run.export)
    origin = Subject(Path(), device="cpu").origin
    assert origin is not None
    assert (origin.run.path, origin.step) == (run.path, 9)


def test_why_something_was_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert reason(CheckpointError("no export")) == "no export"
    assert reason(MemoryError()) == "memory ran out"
    assert capsys.readouterr().err == ""
    assert reason(ValueError("odd")) == "ValueError: odd"
    assert "ValueError: odd" in capsys.readouterr().err
