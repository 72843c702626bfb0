"""A trial at its rungs, on real ranks: measured, asked for once, stopped there and not a step later."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

import rank_tasks
from llm_training_toolkit.checkpoint import list_complete_checkpoints
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_trial_stops_at_its_rung_and_costs_no_step_more(
    world_size: int, pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("trial")
    ended = pools(world_size).run(rank_tasks.train_to_rung, run=str(run.path), rungs=(2, 5), stop_at=5)
    result, asked = ended[0]
    assert result == {"status": "stopped", "step": 5}
    assert asked == [2, 5]
    assert all(others == [] for _, others in ended[1:])
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 2, 5]
    assert max(row["step"] for row in rows) == 5
    assert list_complete_checkpoints(run.checkpoints_dir) == []
    assert read_attempt_record(run, 1)["state"] == "stopped"


def test_a_stop_at_a_rung_is_still_compared_there(
    pools: Callable[[int], RankPool], fresh_run: Callable[[str], RunDirectory]
) -> None:
    run = fresh_run("trial")
    [(result, asked)] = pools(1).run(
        rank_tasks.train_to_rung, run=str(run.path), rungs=(1, 2), stop_at=5, stop_request=StopRequest.STOP
    )
    assert result == {"status": "stopped", "step": 1}
    assert asked == [1], "a resume continues after it and would not ask again"
    assert [path.name[:14] for path in list_complete_checkpoints(run.checkpoints_dir)] == ["step_000000001"]
