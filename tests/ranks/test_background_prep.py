"""Ranks that wait for a later epoch's data continue, stop and fail together, whoever of them sees it first."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import rank_tasks
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from rank_pool import RankPool
from run_results import assert_same_state, read_losses

Pools = Callable[[int], RankPool]
Fresh = Callable[[str], RunDirectory]
REACHED = 7
"""Steps of 11 sequences that the first epoch's 82 are enough for."""


@pytest.fixture
def views(fresh_run: Fresh) -> list[RunDirectory]:
    """A run with one epoch prepared and another on its way, as two machines see it: each its own dataset info."""
    first, second = fresh_run("first"), fresh_run("second")
    for name in ("checkpoints", "attempts"):
        (first.path / name).mkdir()
        (second.path / name).symlink_to(first.path / name)
    for view in (first, second):
        dataset_info = whole(view)
        (stream,) = dataset_info.streams
        assert REACHED * 11 <= stream.epochs[0].sequences < (REACHED + 1) * 11
        begun = replace(dataset_info, streams=(replace(stream, epochs=stream.epochs[:1]),))
        view.dataset_info_path.write_text(begun.to_json())
        view.preparation_state_path.write_text(json.dumps({"state": "working", "why": ""}))
    return [first, second]


def whole(run: RunDirectory) -> DatasetInfo:
    return DatasetInfo.from_json(run.dataset_info_path.read_text())


def test_ranks_continue_when_the_last_of_them_sees_the_data(
    pools: Pools, fresh_run: Fresh, prepared_run: RunDirectory, views: list[RunDirectory]
) -> None:
    undisturbed = fresh_run("undisturbed")
    pools(2).run(rank_tasks.train_run, run=str(undisturbed.path))
    complete = prepared_run.dataset_info_path.read_text()
    answers = pools(2).run(
        rank_tasks.train_with_late_data,
        runs=[str(view.path) for view in views],
        arrivals={"dataset_info.json": {0: complete, 1: complete}},
    )
    assert [answer["status"] for answer in answers] == ["finished"] * 2
    assert read_losses(views[0]) == read_losses(undisturbed)
    assert_same_state(rank_tasks.read_final_state(views[0]), rank_tasks.read_final_state(undisturbed))


def test_a_stop_while_ranks_wait_is_heard_by_all(
    pools: Pools, prepared_run: RunDirectory, views: list[RunDirectory]
) -> None:
    runs = [str(view.path) for view in views]
    complete = prepared_run.dataset_info_path.read_text()
    stopped = pools(2).run(
        rank_tasks.train_with_late_data, runs=runs, arrivals={"dataset_info.json": {0: complete}}, stop_at=2
    )
    assert [(answer["status"], answer["step"]) for answer in stopped] == [("stopped", REACHED)] * 2
    saved = find_latest_checkpoint(views[0].checkpoints_dir)
    assert saved is not None
    assert parse_checkpoint_name(saved) == (REACHED, 1)
    views[1].dataset_info_path.write_text(complete)
    resumed = pools(2).run(rank_tasks.train_with_late_data, runs=runs, arrivals={})
    assert [(answer["status"], answer["step"]) for answer in resumed] == [("finished", 9)] * 2


def test_data_that_one_rank_learns_will_never_come_ends_all(pools: Pools, views: list[RunDirectory]) -> None:
    failed = json.dumps({"state": "failed", "why": "the documents have changed"})
    with pytest.raises(DataError, match="later data could not be prepared: the documents have changed"):
        pools(2).run(
            rank_tasks.train_with_late_data,
            runs=[str(view.path) for view in views],
            arrivals={"preparation.json": {1: failed}},
        )
    assert pools(2).alive  # both ranks raised it: no rank was left waiting for the other
    assert max(read_losses(views[0])) == REACHED
    assert "later data could not be prepared" in Path(views[0].attempts_dir, "0001.json").read_text()
