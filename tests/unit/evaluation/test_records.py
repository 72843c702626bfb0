"""Evaluations on disk: kept in the run they belong to, replaced by the same again, shown side by side."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.evaluation.records import EvalRecord, read_eval_records, write_eval_record
from llm_training_toolkit.evaluation.table import build_eval_tables, collect_eval_records
from llm_training_toolkit.evaluation.task import EvalResult, make_task
from llm_training_toolkit.runs.directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "first")
    made.path.mkdir()
    made.resolved_config_path.write_text("{}")
    return made


def evaluation(task: str, step: int, *, data: str = "code", run: str = "first", **figures: float) -> EvalRecord:
    return EvalRecord.from_result(task, EvalResult(figures, data, {"context": 64}), Path("export"), run, step)


def test_what_is_kept_is_read_again(run: RunDirectory) -> None:
    written = evaluation("infill", 3, exact_match=0.5, edit_similarity=0.75)
    path = write_eval_record(run, written, [{"document": "a.py", "exact": True}])
    assert list(read_eval_records(run)) == [written]
    assert json.loads(path.read_text())["exact_match"] == 0.5
    assert [json.loads(line) for line in path.with_suffix(".items.jsonl").read_text().splitlines()] == [
        {"document": "a.py", "exact": True}
    ]


def test_the_same_evaluation_again_replaces_the_one_before(run: RunDirectory) -> None:
    for value in (0.25, 0.5):
        write_eval_record(run, evaluation("infill", 3, exact_match=value), [])
    write_eval_record(run, evaluation("infill", 3, exact_match=0.75, data="other"), [])
    write_eval_record(run, evaluation("infill", 4, exact_match=1.0), [])
    found = [(each.step, each.data, each.figures["exact_match"]) for each in read_eval_records(run)]
    assert found == [(3, "code", 0.5), (3, "other", 0.75), (4, "code", 1.0)]


def test_a_file_that_is_no_evaluation_is_named(run: RunDirectory) -> None:
    run.evaluations_dir.mkdir()
    (run.evaluations_dir / "notes.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"notes\.json: is no evaluation"):
        list(read_eval_records(run))


def test_runs_are_shown_side_by_side(run: RunDirectory) -> None:
    other = RunDirectory(run.path.parent / "second")
    other.path.mkdir()
    other.resolved_config_path.write_text("{}")
    write_eval_record(run, evaluation("infill", 3, exact_match=0.5, edit_similarity=0.75), [])
    write_eval_record(other, evaluation("infill", 1200, run="second", exact_match=0.625), [])
    write_eval_record(other, evaluation("perplexity", 1200, run="second", loss=2.0, perplexity=7.389), [])
    screen = io.StringIO()
    Terminal(file=screen, width=100).print(*build_eval_tables(collect_eval_records([run, other])), sep="\n")
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert lines[:4] == [
        ["infill"],
        ["run", "step", "exact_match", "edit_similarity", "data"],
        ["first", "3", "0.5000", "0.7500", "code"],
        ["second", "1,200", "0.6250", "code"],
    ]
    assert ["second", "1,200", "2.0000", "7.3890", "code"] in lines


def test_nothing_to_compare_is_said(run: RunDirectory) -> None:
    with pytest.raises(PlanError, match="none of these runs has been evaluated"):
        collect_eval_records([run])
    with pytest.raises(CheckpointError, match="no run there"):
        collect_eval_records([RunDirectory(run.path.parent)])


def test_a_setting_of_another_task_is_refused() -> None:
    with pytest.raises(PlanError, match="--stride: not for --task infill, which takes --data, --format, --middle"):
        make_task("infill", {"stride": 5})
    with pytest.raises(PlanError, match=r"no such task\. There are perplexity, infill, humaneval"):
        make_task("mmlu", {})
