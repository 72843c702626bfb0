"""Steps whose loss stands out: stopped before the update, or left out on every rank, bit for bit after a resume too."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

import rank_tasks
from llm_training_toolkit.checkpoint import CheckpointReader
from llm_training_toolkit.checkpoint.state import SkippedStep
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.train.loss_spikes import MAX_CONSECUTIVE_SKIPS, MIN_SPIKE_STEPS
from rank_pool import RankPool
from run_results import assert_same_state, newest_checkpoint, read_training_rows

Pools = Callable[[int], RankPool]
Fresh = Callable[[str], RunDirectory]
BATCH = 4
CORRUPT_STEP = MIN_SPIKE_STEPS + 3
STEPS = MIN_SPIKE_STEPS + 8
EVERY = 3  # steps between two checkpoints; one is right before the step that is left out, one soon after it


def changes(**sections: dict[str, Any]) -> dict[str, Any]:
    train = {"steps": STEPS, "global_batch_size": BATCH}
    # Fast enough that tokens drawn by chance stand out from what was learnt by then.
    optim = {"lr": 1e-2}
    found: dict[str, Any] = {
        "train": train,
        "optim": optim,
        "checkpoint": {"interval": 1000},
        "failures": {"on_loss_spike": "skip"},
    }
    for name, values in sections.items():
        found[name] = found.get(name, {}) | values
    return found


@pytest.fixture
def prepared(fresh_run: Fresh) -> Fresh:
    """Runs whose data is prepared as far as the longest of these tests goes."""

    def make(name: str) -> RunDirectory:
        run = fresh_run(name)
        config = rank_tasks.build_worker_spec(str(run.path), changes(train={"steps": STEPS + 40})).config
        run.dataset_info_path.write_text(
            prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info.to_json()
        )
        return run

    return make


@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (0, "bf16"), (3, "fp32")])
def test_an_update_is_skipped_and_a_resume_anywhere_is_bitwise_the_same(
    pools: Pools, prepared: Fresh, zero: int, precision: str
) -> None:
    setting = changes(
        engine={"zero_stage": zero}, train={"precision": precision}, checkpoint={"interval": EVERY, "keep_latest": 100}
    )
    whole = prepared("whole")
    options: dict[str, Any] = {"corrupt_steps": [CORRUPT_STEP], "changes": setting}
    answers = pools(2).run(rank_tasks.train_on_corrupt_data, run=str(whole.path), **options)
    assert [answer["status"] for answer in answers] == ["finished"] * 2
    manifest = CheckpointReader(newest_checkpoint(whole)).manifest
    assert manifest.skips == (SkippedStep(CORRUPT_STEP + 1, CORRUPT_STEP * BATCH, BATCH),)
    assert manifest.update_count == STEPS - 1
    assert [step for step, row in read_training_rows(whole).items() if "optim/skipped" in row] == [CORRUPT_STEP + 1]
    [warning] = [
        event.message
        for event in answers[0]["events"]
        if isinstance(event, WarningEvent) and "left out" in event.message
    ]
    for words in (f"step {CORRUPT_STEP + 1}: the loss is", "this update is left out", "module_"):
        assert words in warning
    losses = {step: row["train/loss"] for step, row in read_training_rows(whole).items()}
    for start in (CORRUPT_STEP - 1, CORRUPT_STEP + 2):
        run, first = prepared(f"from_{start}"), whole.get_checkpoint_dir(start, 1)
        shutil.copytree(first, run.checkpoints_dir / first.name)  # what a stop leaves, too: test_elastic.py
        pools(2).run(rank_tasks.train_on_corrupt_data, run=str(run.path), **options)
        resumed = {step: row["train/loss"] for step, row in read_training_rows(run).items()}
        assert resumed == {step: loss for step, loss in losses.items() if step > start}
        assert CheckpointReader(newest_checkpoint(run)).manifest.skips == manifest.skips
        assert_same_state(rank_tasks.read_final_state(run), rank_tasks.read_final_state(whole))


def test_by_default_the_run_stops_as_it_was_before_and_resumes_as_configured(pools: Pools, prepared: Fresh) -> None:
    run, whole = prepared("stops"), prepared("skips")
    stop = changes(failures={"on_loss_spike": "stop"})
    spike = rf"step {CORRUPT_STEP + 1}: the loss is .* deviations above its median"
    words = rf"{spike}.*checkpoint of step {CORRUPT_STEP} is saved.*module_"
    for _ in range(2):
        with pytest.raises(TrainingError, match=words):
            pools(2).run(
                rank_tasks.train_on_corrupt_data, run=str(run.path), corrupt_steps=[CORRUPT_STEP], changes=stop
            )
        assert CheckpointReader(newest_checkpoint(run)).manifest.step == CORRUPT_STEP
    for each in (run, whole):
        pools(2).run(
            rank_tasks.train_on_corrupt_data, run=str(each.path), corrupt_steps=[CORRUPT_STEP], changes=changes()
        )
    assert_same_state(rank_tasks.read_final_state(run), rank_tasks.read_final_state(whole))


def test_a_loss_that_stays_high_is_no_spike_for_ever(pools: Pools, prepared: Fresh) -> None:
    run = prepared("shifts")
    longer = changes(train={"steps": STEPS + 40})
    corrupt_steps = list(range(CORRUPT_STEP, STEPS + 40))
    with pytest.raises(TrainingError, match=f"after {MAX_CONSECUTIVE_SKIPS} updates in a row that were left out"):
        pools(2).run(rank_tasks.train_on_corrupt_data, run=str(run.path), corrupt_steps=corrupt_steps, changes=longer)
    manifest = CheckpointReader(newest_checkpoint(run)).manifest
    assert (manifest.step, manifest.update_count) == (CORRUPT_STEP + MAX_CONSECUTIVE_SKIPS, CORRUPT_STEP)
