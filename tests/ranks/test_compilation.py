"""Runs with compiled layers: the losses and weights of eager ones, bit for bit, and a resume that changes its mind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compiled_runs
import rank_tasks
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.distributed.events import NoteEvent
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup.machine import find_compiler_problem
from rank_pool import RankPool
from run_results import newest_checkpoint, read_losses

Pools = Callable[[int], RankPool]


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_compiled_run_is_the_eager_one(pools: Pools, prepared_run: RunDirectory, tmp_path: Path, zero: int) -> None:
    """Six sequences on each rank, in micro-batches of four and two; the last three steps of one run are eager."""
    runs = {}
    missing = find_compiler_problem(gpu=False)
    if missing:
        pytest.skip(missing)
    for name in ("eager", "compiled"):
        shutil.copytree(prepared_run.path, tmp_path / name)
        runs[name] = RunDirectory(tmp_path / name)
    changes: dict[str, Any] = {
        "engine": {"zero_stage": zero},
        "train": {"steps": 4, "global_batch_size": 11, "micro_batch_size": 4},
        "model": {"activation_checkpointing": ("none", "selective", "full")[zero]},
    }
    pools(2).run(rank_tasks.train_run, run=str(runs["eager"].path), changes=changes)
    compiled = changes | {"model": changes["model"] | {"compile": True}}
    first = pools(2).run(compiled_runs.work_on_compiled, run=str(runs["compiled"].path), changes=compiled, stop_after=2)
    assert [answer["graphs"] for answer in first] == [2, 2], "one for each size of micro-batch, and no break"
    assert CheckpointReader(newest_checkpoint(runs["compiled"])).manifest.extra["compile"] is True
    last = pools(2).run(rank_tasks.train_run, run=str(runs["compiled"].path), changes=changes)[0]
    assert last["status"] == "finished"
    notes = [event.message for event in last["events"] if isinstance(event, NoteEvent)]
    assert any(", compiled and now runs on" in note for note in notes)
    assert read_losses(runs["compiled"]) == read_losses(runs["eager"])
    assert sorted(read_losses(runs["eager"])) == [1, 2, 3, 4]
    found, wanted = (rank_tasks.read_final_state(runs[name]) for name in ("compiled", "eager"))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    assert not any("_orig_mod" in name for name in found)
