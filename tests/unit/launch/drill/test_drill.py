"""`ltt drill`: real failures done to a run, and a count of what ranks fetched that finds what is missing."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.data.sample_log import FetchedSequence
from llm_training_toolkit.errors import CheckpointError, ConfigError, PlanError
from llm_training_toolkit.launch.drill.data_audit import (
    AttemptSpan,
    audit_sequences,
    read_attempt_spans,
    read_fetched_sequences,
)
from llm_training_toolkit.launch.drill.drill import DrillRunner, DrillSpec, schedule_faults
from llm_training_toolkit.launch.drill.faults import FAULT_KINDS
from llm_training_toolkit.launch.drill.report import InjectedFault
from llm_training_toolkit.runs.attempts import begin_attempt
from llm_training_toolkit.runs.directory import RunDirectory

EPOCHS = [[4, 4]]
WHOLE = [FetchedSequence(0, epoch, sequence, 10 * epoch + sequence) for epoch in range(2) for sequence in range(4)]


def test_nothing_is_missing_where_each_was_fetched_once() -> None:
    assert audit_sequences(WHOLE[::-1], WHOLE, EPOCHS) == (0, 0)


def test_what_was_left_out_or_fetched_twice_is_counted() -> None:
    assert audit_sequences(WHOLE[1:], WHOLE, EPOCHS) == (1, 0)
    assert audit_sequences([*WHOLE, WHOLE[3], WHOLE[3]], WHOLE, EPOCHS) == (0, 2)
    assert audit_sequences([*WHOLE[:2], *WHOLE[1:2], *WHOLE[3:]], WHOLE, EPOCHS) == (1, 1)


def test_other_tokens_at_the_same_place_are_another_sequence() -> None:
    assert audit_sequences([WHOLE[0]._replace(tokens_crc32=-1), *WHOLE[1:]], WHOLE, EPOCHS) == (1, 0)


def test_an_epoch_that_another_follows_has_to_be_whole_whatever_the_undisturbed_run_did() -> None:
    assert audit_sequences(WHOLE[1:6], WHOLE[1:6], EPOCHS) == (1, 0)
    assert audit_sequences(WHOLE[:6], WHOLE[:6], EPOCHS) == (0, 0)


def test_the_lineage_takes_of_each_attempt_the_steps_that_others_went_on_from(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for resumed, steps in ((None, 7), ("step_000000005_a1", 6), ("step_000000005_a1", 9)):
        number = begin_attempt(run, {"resumed": resumed})
        run.sample_log_dir.mkdir(exist_ok=True)
        first = 5 if resumed else 0
        lines = [json.dumps({"step": step, "fetched": [[0, 0, step, number]]}) for step in range(first + 1, steps + 1)]
        (run.sample_log_dir / f"attempt_{number}_rank_0.jsonl").write_text("\n".join([*lines, '{"step": 9, "fet']))
    lineage = read_attempt_spans(run, "step_000000009_a3")
    assert lineage == [AttemptSpan(1, 0, 5), AttemptSpan(3, 5, 9)]
    found = read_fetched_sequences(run, lineage)
    assert [(each.sequence, each.tokens_crc32) for each in found] == [(s, 1) for s in range(1, 6)] + [
        (s, 3) for s in range(6, 10)
    ]
    with pytest.raises(CheckpointError, match="nothing is known of the attempt"):
        read_attempt_spans(run, "step_000000009_a7")


def test_a_failure_that_the_run_cannot_have_is_refused(launch_config: Callable[..., Path]) -> None:
    config = launch_config("refused", cluster={"workers": 0})
    for kinds in (["worker", "flood"], ["hang"], ["head"], [""], []):
        with pytest.raises(
            ConfigError,
            match=r"this run can have worker, driver, stop, during_checkpoint, corrupt_checkpoint, storage \(",
        ):
            DrillRunner(DrillSpec(config, (), 1, kinds, 0, "20s"), print)
    with pytest.raises(PlanError, match="this machine has"):
        DrillRunner(
            DrillSpec(config, ("cluster.workers=500", "train.global_batch_size=500"), 1, ["node"], 0, "20s"), print
        )
    with pytest.raises(ConfigError, match=r"failures\.hang"):
        DrillRunner(DrillSpec(config, (), 1, ["worker"], 0, "soon"), print)


@given(st.integers(1, 40), st.integers(1, len(FAULT_KINDS)), st.integers(0, 99), st.integers(100, 5000))
def test_failures_are_spread_over_the_run_and_no_kind_comes_more_often(
    kills: int, count: int, seed: int, steps: int
) -> None:
    kinds = list(FAULT_KINDS)[:count]
    due = schedule_faults(steps, kills, kinds, random.Random(seed))
    assert due == sorted(due, key=lambda each: each[0])
    assert len(due) == kills
    assert 0 <= due[0][0] <= due[-1][0] < steps
    often = Counter(kind for _, kind in due)
    assert max(often.values()) - min(often[kind] for kind in kinds) <= 1


def test_an_older_checkpoint_than_the_newest_sound_one_is_wrong() -> None:
    def went_on(newest: str | None, taken: str | None) -> bool:
        return InjectedFault("worker", 1, 2.0, 1.0, newest, taken, half_written=False).has_wrong_checkpoint

    assert not went_on(None, None)
    assert not went_on("step_000000020_a1", "step_000000020_a1")
    assert not went_on("step_000000020_a1", "step_000000030_a1"), "completed since"
    assert went_on("step_000000020_a1", "step_000000010_a1")
    assert went_on("step_000000020_a1", None)
