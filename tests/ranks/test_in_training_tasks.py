"""Tasks carried out while a run trains, on real ranks: what they leave, and that training does not notice them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import rank_tasks
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool

TASKS = [{"task": "perplexity", "interval": 4}, {"task": "infill", "limit": 2, "interval": 8}]
FIGURES = ["eval/perplexity_loss", "eval/infill_ended"]
CHANGES = {"eval": {"tasks": TASKS}, "engine": {"zero_stage": 3}, "export": {"at_end": True}}


def evaluated(run: RunDirectory) -> list[tuple[int, str]]:
    """(step, figure) as they were recorded."""
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [
        (row["step"], name) for row in rows for name in row if name in {"eval/perplexity_loss", "eval/infill_ended"}
    ]


def test_training_does_not_notice_the_tasks_between_its_steps(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    measured, plain = fresh_run("measured"), fresh_run("plain")
    results = pools(2).run(rank_tasks.train_run, run=str(measured.path), changes=CHANGES)
    pools(2).run(rank_tasks.train_run, run=str(plain.path), changes=CHANGES | {"eval": {"tasks": []}})
    assert {result["step"] for result in results} == {9}
    assert evaluated(measured) == [(4, FIGURES[0]), *((step, name) for step in (8, 9) for name in FIGURES)]
    assert sorted(path.name for path in measured.checkpoints_dir.iterdir())[:2] == [
        "step_000000004_a1",
        "step_000000008_a1",
    ]
    assert not measured.task_export_dir.exists()
    found, wanted = (find_latest_checkpoint(run.checkpoints_dir) for run in (measured, plain))
    assert found is not None
    assert wanted is not None
    for name, values in rank_tasks.read_state(wanted).items():
        assert (rank_tasks.read_state(found)[name] == values).all(), name


def test_a_stop_breaks_the_tasks_off_and_the_next_start_makes_up_for_them(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("broken-off")
    told: dict[str, Any] = {"message": "evaluating perplexity", "seconds": 1.1}
    ended = pools(2).run(rank_tasks.train_until_message, run=str(run.path), changes=CHANGES, **told)
    assert ended == [{"status": "stopped", "step": 4}] * 2
    assert evaluated(run) == []
    results = pools(2).run(rank_tasks.train_run, run=str(run.path), changes=CHANGES)
    assert {result["status"] for result in results} == {"finished"}
    assert [step for step, name in evaluated(run) if name == FIGURES[0]] == [4, 8, 9]


def test_a_failed_export_is_reported_and_the_run_continues(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("no-room")
    run.task_export_dir.write_text("a file, where a folder is to be")
    results = pools(1).run(rank_tasks.train_run, run=str(run.path), changes=CHANGES)
    warnings = [event.message for event in results[0]["events"] if isinstance(event, WarningEvent)]
    assert results[0]["status"] == "finished"
    assert len(warnings) == 2
    assert "the tasks of step 4 were not carried out" in warnings[0]
