"""Retention: the newest checkpoints stay, what was never completed goes, other directories are nobody's business."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.checkpoint import clean, kept
from llm_training_toolkit.runs import RunDirectory

Steps = st.lists(st.integers(0, 2_000), max_size=30)
Keep = st.integers(1, 10)
KeepEvery = st.integers(0, 50)


@given(Steps.filter(bool), Keep, KeepEvery)
def test_the_newest_is_always_kept(steps: list[int], keep: int, keep_every: int) -> None:
    assert max(steps) in kept(steps, keep, keep_every)


@given(Steps, Keep, KeepEvery)
def test_what_is_kept_are_the_newest_and_the_multiples(steps: list[int], keep: int, keep_every: int) -> None:
    stay = kept(steps, keep, keep_every)
    assert stay <= set(steps)
    for step in steps:
        newer = len({other for other in steps if other > step})
        assert (step in stay) == (newer < keep or (keep_every > 0 and step % keep_every == 0))


@given(Steps, Keep, KeepEvery)
def test_neither_order_nor_repetition_matters(steps: list[int], keep: int, keep_every: int) -> None:
    assert kept(steps, keep, keep_every) == kept(sorted(steps * 2, reverse=True), keep, keep_every)


@given(Steps, st.integers(0, 2_000), Keep, KeepEvery)
def test_what_went_once_never_comes_back_as_steps_are_added(
    steps: list[int], later: int, keep: int, keep_every: int
) -> None:
    newer = max(steps, default=0) + later
    assert kept([*steps, newer], keep, keep_every) <= kept(steps, keep, keep_every) | {newer}


def checkpoint(run: RunDirectory, step: int, attempt: int, *, whole: bool = True) -> Path:
    directory = run.checkpoint(step, attempt)
    directory.mkdir(parents=True)
    (directory / "fragments_00000.safetensors").write_bytes(b"x" * 10)
    if whole:
        (directory / "manifest.json").write_text("{}")
    return directory


def names(run: RunDirectory) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_clean_deletes_the_oldest_and_keeps_the_multiples(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40, 50):
        checkpoint(run, step, 1)
    clean(run.checkpoints, keep=2, keep_every=20, attempt=9)
    assert names(run) == ["step_000000020_a1", "step_000000040_a1", "step_000000050_a1"]


def test_clean_goes_by_the_number_of_steps_not_by_the_attempt(run: RunDirectory) -> None:
    for step, attempt in ((10, 9), (20, 10), (30, 2)):
        checkpoint(run, step, attempt)
    clean(run.checkpoints, keep=1, keep_every=0, attempt=9)
    assert names(run) == ["step_000000030_a2"]


def test_clean_deletes_partial_checkpoints_even_newer_ones(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1, whole=False)
    clean(run.checkpoints, keep=1, keep_every=0, attempt=9)
    assert names(run) == ["step_000000010_a1"]


def test_partial_checkpoints_take_no_place_among_the_kept(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1)
    checkpoint(run, 30, 1, whole=False)
    clean(run.checkpoints, keep=2, keep_every=0, attempt=9)
    assert names(run) == ["step_000000010_a1", "step_000000020_a1"]


def test_clean_leaves_directories_of_other_names_alone(run: RunDirectory) -> None:
    checkpoint(run, 10, 1)
    checkpoint(run, 20, 1)
    others = ["left_behind_1_step_000000005_a1", "step_mine", "step_000000010_a1.copy", "step_10_a1", "notes"]
    for name in others:
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "fragments_00000.safetensors").write_bytes(b"x")
    (run.checkpoints / "step_000000010_a1.copy" / "manifest.json").write_text("{}")
    clean(run.checkpoints, keep=1, keep_every=0, attempt=9)
    assert names(run) == sorted([*others, "step_000000020_a1"])


def test_clean_where_there_is_nothing(tmp_path: Path) -> None:
    clean(tmp_path / "absent", keep=1, keep_every=0, attempt=9)
    assert not (tmp_path / "absent").exists()
