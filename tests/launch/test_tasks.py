"""The tasks at the end of a run: whatever becomes of them, the run is finished."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rank_tasks
from llm_training_toolkit.distributed.context import Event, RunContext, Wish
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.evaluation.in_training import Midway
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.run_tasks import Mark, are_carried_out, carry_out, reason
from llm_training_toolkit.export.export_run import Trained
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.runs.directory import RunDirectory


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


def test_tasks_that_end_their_process_are_not_begun_for_ever(tmp_path: Path) -> None:
    mark, other = (Mark(tmp_path / "eval" / "at_step_4", what) for what in ("tasks", "other tasks"))
    assert [mark.begin() for _ in range(3)] == [True, True, False]
    assert not mark.is_settled
    assert other.begin(), "they may do better"
    assert mark.begin()
    mark.settle()
    assert (mark.is_settled, other.is_settled) == (True, False)


def test_tasks_that_were_not_wanted_any_more_count_as_never_begun(tmp_path: Path) -> None:
    mark = Mark(tmp_path / "at_end", "tasks")
    for _ in range(4):
        assert mark.begin()
        mark.forget()


def midway_of(run: RunDirectory, context: RunContext) -> Midway:
    """What is due after step 4 of a run, whose checkpoint holds nothing that could be exported."""
    place = rank_tasks.place_of(str(run.path), {"eval": {"tasks": [{"task": "perplexity", "every": 4}]}})
    checkpoint = run.checkpoint(4, 1)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "manifest.json").touch()
    return Midway(Trained(run, place.config, place.receipt), metrics=Metrics(run, 1, 0, context), context=context)


def test_ranks_that_are_gone_are_no_failure_of_a_task(fresh_run: Callable[[str], RunDirectory]) -> None:
    run, said = fresh_run("alone"), list[Event]()
    for _ in range(2):
        context = RunContext(0, 2, torch.device("cpu"), report=said.append)  # of a group that does not exist
        with pytest.raises(ValueError, match="process group"):
            midway_of(run, context).carry_out(4)
    assert said == []
    alone = RunContext(0, 1, torch.device("cpu"), report=said.append)
    assert midway_of(run, alone).carry_out(4) is Wish.GO_ON
    assert "2 times the process that began them was gone" in said[0]["message"]
    assert midway_of(run, alone).carry_out(4) is Wish.GO_ON
    assert len(said) == 1


@pytest.mark.parametrize("wish", [Wish.LEAVE_WHEN_SAVED, Wish.LEAVE, Wish.STOP])
def test_every_wish_to_end_breaks_the_tasks_off(wish: Wish, fresh_run: Callable[[str], RunDirectory]) -> None:
    run = fresh_run("not-now")
    context = RunContext(0, 1, torch.device("cpu"), wish=lambda: wish)
    half = run.task_export.with_name(".export_for_tasks.writing")
    half.mkdir()
    for _ in range(3):
        assert midway_of(run, context).carry_out(4) is wish
    assert not half.exists(), "of an attempt that was killed"
    assert not (run.evaluations / "at_step_4").exists()
