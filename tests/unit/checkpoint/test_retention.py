"""Retention: the newest checkpoints stay, what was never completed goes, other directories are nobody's business."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.checkpoint import (
    RetentionPolicy,
    apply_retention_policy,
    delete_incomplete_checkpoints,
    select_kept_steps,
)
from llm_training_toolkit.runs.directory import RunDirectory

Steps = st.lists(st.integers(0, 2_000), max_size=30)


Rules = st.builds(RetentionPolicy, st.integers(1, 10), st.integers(0, 50), st.integers(0, 5))
Losses = st.dictionaries(st.integers(0, 2_000), st.floats(0.1, 10.0), max_size=30)


@given(Steps.filter(bool), Rules, Losses)
def test_the_newest_is_always_kept(steps: list[int], rule: RetentionPolicy, losses: dict[int, float]) -> None:
    assert max(steps) in select_kept_steps(steps, rule, losses)


@given(Steps, Rules, Losses)
def test_what_is_kept_are_the_newest_the_multiples_and_the_best(
    steps: list[int], rule: RetentionPolicy, losses: dict[int, float]
) -> None:
    stay = select_kept_steps(steps, rule, losses)
    assert stay <= set(steps)
    for step in steps:
        newer = len({other for other in steps if other > step})
        better = len(
            {other for other in set(steps) & losses.keys() if (losses[other], other) < (losses.get(step), step)}
            if step in losses
            else set()
        )
        best = step in losses and better < rule.keep_best_k
        assert (step in stay) == (
            newer < rule.keep_latest_k or (rule.keep_every > 0 and step % rule.keep_every == 0) or best
        )


@given(Steps, Rules, Losses)
def test_neither_order_nor_repetition_matters(
    steps: list[int], rule: RetentionPolicy, losses: dict[int, float]
) -> None:
    assert select_kept_steps(steps, rule, losses) == select_kept_steps(sorted(steps * 2, reverse=True), rule, losses)


@given(Steps, st.integers(0, 2_000), Rules, Losses)
def test_what_went_once_never_comes_back_as_steps_are_added(
    steps: list[int], later: int, rule: RetentionPolicy, losses: dict[int, float]
) -> None:
    newer = max(steps, default=0) + later
    assert select_kept_steps([*steps, newer], rule, losses) <= select_kept_steps(steps, rule, losses) | {newer}


def checkpoint(run: RunDirectory, step: int, attempt: int, *, whole: bool = True) -> Path:
    directory = run.get_checkpoint_dir(step, attempt)
    directory.mkdir(parents=True)
    (directory / "fragments_00000.safetensors").write_bytes(b"x" * 10)
    if whole:
        (directory / "manifest.json").write_text("{}")
    return directory


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints_dir.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_clean_deletes_the_oldest_and_keeps_the_multiples(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40, 50):
        checkpoint(run, step, 1)
    apply_retention_policy(run, RetentionPolicy(2, 20), attempt=9, losses={})
    assert names(run) == ["step_000000020_a1", "step_000000040_a1", "step_000000050_a1"]


def test_clean_goes_by_the_number_of_steps_not_by_the_attempt(run: RunDirectory) -> None:
    for step, attempt in ((10, 9), (20, 10), (30, 2)):
        checkpoint(run, step, attempt)
    apply_retention_policy(run, RetentionPolicy(1, 0), attempt=9, losses={})
    assert names(run) == ["step_000000030_a2"]


def test_clean_deletes_partial_checkpoints_even_newer_ones(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1, whole=False)
    apply_retention_policy(run, RetentionPolicy(1, 0), attempt=9, losses={})
    assert names(run) == ["step_000000010_a1"]


def test_partial_checkpoints_take_no_place_among_the_kept(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1)
    checkpoint(run, 30, 1, whole=False)
    apply_retention_policy(run, RetentionPolicy(2, 0), attempt=9, losses={})
    assert names(run) == ["step_000000010_a1", "step_000000020_a1"]


def test_clean_leaves_directories_of_other_names_alone(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1)
    others = ["quarantine_1_step_000000005_a1", "step_mine", "step_000000010_a1.copy", "step_10_a1", "notes"]
    for name in others:
        (run.checkpoints_dir / name).mkdir()
        (run.checkpoints_dir / name / "fragments_00000.safetensors").write_bytes(b"x")
    (run.checkpoints_dir / "step_000000010_a1.copy" / "manifest.json").write_text("{}")
    apply_retention_policy(run, RetentionPolicy(1, 0), attempt=9, losses={})
    assert names(run) == sorted([*others, "step_000000020_a1"])


def test_clean_where_there_is_nothing(tmp_path: Path) -> None:
    apply_retention_policy(RunDirectory(tmp_path / "absent"), RetentionPolicy(1, 0), attempt=9, losses={})
    assert not (tmp_path / "absent").exists()


def test_clean_keeps_the_best_however_old_it_is(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40):
        checkpoint(run, step, 1)
    apply_retention_policy(
        run, RetentionPolicy(1, keep_best_k=1), attempt=9, losses={10: 3.0, 20: 2.0, 25: 1.0, 40: 2.5}
    )
    assert names(run) == ["step_000000020_a1", "step_000000040_a1"]


def test_what_an_earlier_attempt_left_unfinished_goes_and_nothing_else(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1, whole=False)
    checkpoint(run, 20, 2, whole=False)
    delete_incomplete_checkpoints(run, attempt=1)
    assert names(run) == ["step_000000010_a1", "step_000000020_a2"]
