"""Falling back: a damaged newest checkpoint is set aside with a warning, and the one before it is used."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import build_manifest, save
from llm_training_toolkit.checkpoint import (
    AsyncWrite,
    RetentionPolicy,
    allocate_host_buffer,
    find_latest_checkpoint,
)
from llm_training_toolkit.checkpoint.manager import CheckpointLineage, CheckpointManager
from llm_training_toolkit.checkpoint.restore import find_latest_valid_checkpoint
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.runs.attempts import begin_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory

OPTIMIZER = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)


@dataclass(frozen=True)
class Part:
    """All of one parameter."""

    values: Tensor
    name: str = "w"
    start: int = 0

    @property
    def count(self) -> int:
        return len(self.values)

    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:  # noqa: ARG002 - the protocol
        return {"weights": self.values}


@dataclass
class Rank:
    """The only rank of a run, and what it told the person at the keyboard."""

    run: RunDirectory
    events: list[Any] = field(default_factory=list)

    @property
    def context(self) -> RunContext:
        return RunContext(0, 1, torch.device("cpu"), event_listener=self.events.append)

    def write(self, step: int) -> Path:
        manifest = build_manifest(step, {"w": (100,)})
        directory = self.run.get_checkpoint_dir(step, 1)
        save(self.context, directory, [Part(torch.full((100,), float(step)))], OPTIMIZER, manifest)
        return directory

    def newest_step(self) -> int | None:
        found = find_latest_valid_checkpoint(self.run, self.context)
        return None if found is None else found.manifest.step


@pytest.fixture
def rank(tmp_path: Path) -> Rank:
    return Rank(RunDirectory(tmp_path))


def truncate(directory: Path) -> None:
    file = directory / "fragments_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def test_a_run_without_checkpoints_has_none(rank: Rank) -> None:
    assert rank.newest_step() is None
    assert rank.events == []


def test_a_sound_newest_checkpoint_is_used_in_silence(rank: Rank) -> None:
    rank.write(1)
    rank.write(2)
    assert rank.newest_step() == 2
    assert rank.events == []


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(rank: Rank) -> None:
    first, second = rank.write(1), rank.write(2)
    truncate(second)
    assert rank.newest_step() == 1
    aside = f"quarantine_1_{second.name}"
    assert sorted(path.name for path in rank.run.checkpoints_dir.iterdir()) == [aside, first.name]
    [event] = rank.events
    assert isinstance(event, WarningEvent)
    for word in (second.name, "fragments_00000.safetensors", "were written", aside, "the one before it is used"):
        assert word in event.message


def test_an_unreadable_manifest_gives_way_too(rank: Rank) -> None:
    rank.write(1)
    (rank.write(2) / "manifest.json").write_text("{")
    assert rank.newest_step() == 1
    assert "not a readable manifest" in rank.events[0].message


def test_every_damaged_checkpoint_is_passed_over_and_named(rank: Rank) -> None:
    rank.write(1)
    truncate(rank.write(2))
    (rank.write(3) / "fragments_00000.safetensors").unlink()
    assert rank.newest_step() == 1
    assert [event.message.split()[1] for event in rank.events] == ["step_000000003_a1", "step_000000002_a1"]


def test_a_checkpoint_never_completed_is_passed_over_without_a_word(rank: Rank) -> None:
    rank.write(1)
    (rank.write(2) / "manifest.json").unlink()
    assert rank.newest_step() == 1
    assert rank.events == []


def test_the_only_checkpoint_stays_where_it_is_when_damaged_and_the_run_is_refused(rank: Rank) -> None:
    truncate(rank.write(1))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"only checkpoint of this run is damaged.*start again from step 0"):
            rank.newest_step()
    assert [path.name for path in rank.run.checkpoints_dir.iterdir()] == ["step_000000001_a1"]


def test_a_checkpoint_written_again_after_the_damage_is_used(rank: Rank) -> None:
    rank.write(1)
    truncate(rank.write(2))
    assert rank.newest_step() == 1
    rank.write(2)
    assert rank.newest_step() == 2
    shutil.rmtree(rank.run.get_checkpoint_dir(2, 1))
    assert find_latest_checkpoint(rank.run.checkpoints_dir) == rank.run.get_checkpoint_dir(1, 1)


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_in_its_place(rank: Rank) -> None:
    rank.write(1)
    manifest = rank.write(2) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 3', '"format": 4'))
    with pytest.raises(CheckpointError, match="format 4, this version reads 3"):
        rank.newest_step()
    assert manifest.exists()


class Model:
    """What a saver asks of an engine: one parameter of a hundred weights."""

    optimizer = OPTIMIZER
    shapes: Mapping[str, tuple[int, ...]] = {"w": (100,)}
    column_parts: Mapping[str, int] = {}

    def owned_fragments(self) -> list[Part]:
        return [Part(torch.zeros(100))]


def saver(rank: Rank, run_id: str = "", sync_metrics: Callable[[], None] = lambda: None) -> CheckpointManager:
    lineage = CheckpointLineage(1, None, 0, 1, "c", "d", {}, {}, run_id)
    engine: Any = Model()
    rule = RetentionPolicy(3)
    return CheckpointManager(
        rank.run,
        rank.context,
        engine,
        lineage,
        every_steps=1,
        every_seconds=None,
        rule=rule,
        sync_metrics=sync_metrics,
    )


def test_a_step_is_saved_once(rank: Rank) -> None:
    saving = saver(rank)
    saving.begin_save(TrainState(5, 5, 5))
    saving.finalize_save()
    manifest = rank.run.get_checkpoint_dir(5, 1) / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert saving.begin_save(TrainState(5, 5, 5)) == 0.0
    assert not saving.has_pending_checkpoint
    assert manifest.stat().st_mtime_ns == written


PLACE = pytest.mark.parametrize(("begun_anew", "said"), [(True, "begun anew"), (False, "removed while")])


@PLACE
def test_a_process_whose_run_was_removed_writes_no_checkpoint_into_the_new_one(
    rank: Rank, begun_anew: bool, said: str
) -> None:
    number = begin_attempt(rank.run, {})
    run_id = read_attempt_record(rank.run, number)["run_id"]
    saving = saver(rank, run_id)
    saving.begin_save(TrainState(5, 5, 5))
    saving.finalize_save()
    manifest = json.loads((rank.run.get_checkpoint_dir(5, 1) / "manifest.json").read_text())
    assert manifest["run_id"] == run_id
    saving.begin_save(TrainState(6, 6, 6))
    for directory in (rank.run.attempts_dir, rank.run.checkpoints_dir):
        shutil.rmtree(directory)
    if begun_anew:
        assert begin_attempt(rank.run, {}) == number
        assert read_attempt_record(rank.run, number)["run_id"] != run_id
    with pytest.raises(CheckpointError, match=said):
        saving.finalize_save()
    assert find_latest_checkpoint(rank.run.checkpoints_dir) is None


def test_attempts_of_a_run_share_its_id(rank: Rank) -> None:
    numbers = [begin_attempt(rank.run, {}) for _ in range(3)]
    (rank.run.attempts_dir / "0002.json").write_text("")
    numbers.append(begin_attempt(rank.run, {}))
    ids = {read_attempt_record(rank.run, number).get("run_id") for number in numbers}
    assert len(ids - {None}) == 1


def test_metrics_and_directories_are_synced_before_a_manifest_says_that_they_are_there(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    plain = os.fsync

    def record_sync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        plain(descriptor)

    saving = saver(rank, sync_metrics=lambda: order.append("metrics"))
    monkeypatch.setattr(os, "fsync", record_sync)
    saving.begin_save(TrainState(5, 5, 5))
    saving.finalize_save()
    *before, manifest, last = order
    directory = rank.run.get_checkpoint_dir(5, 1)
    assert set(before) == {"fragments_00000.safetensors", "metrics", directory.name, "checkpoints", rank.run.path.name}
    assert (manifest.startswith(".manifest.json."), last) == (True, directory.name)


@pytest.mark.parametrize("name", ["fragments_00000.safetensors", "manifest.json"])
def test_storage_that_cannot_be_read_is_no_damage(rank: Rank, name: str) -> None:
    rank.write(1)
    file = rank.write(2) / name
    moved = file.rename(file.with_name("elsewhere"))
    if name == "manifest.json":
        file.mkdir()
    else:
        file.symlink_to("x" * 300)  # longer than a name may be
    with pytest.raises(OSError, match=r"Is a directory|too long"):
        rank.newest_step()
    assert rank.events == []
    if file.is_symlink():
        file.unlink()
    else:
        file.rmdir()
    moved.rename(file)
    assert rank.newest_step() == 2


def test_a_slow_write_is_an_advance_while_the_file_grows(rank: Rank) -> None:
    directory = rank.run.get_checkpoint_dir(5, 1)
    pieces = [Part(torch.zeros(100))]
    writing = AsyncWrite(0, directory, pieces, OPTIMIZER, allocate_host_buffer(pieces))
    writing.wait_for_result()
    assert writing.bytes_written == (directory / "fragments_00000.safetensors").stat().st_size > 400


class Large(Part):
    def get_tensors(self, optimizer: torch.optim.Optimizer) -> Mapping[str, Tensor]:  # noqa: ARG002 - the protocol
        raise MemoryError


def test_a_copy_that_does_not_fit_is_no_matter_of_the_micro_batch(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "owned_fragments", lambda _self: [Large(torch.zeros(100))])
    with pytest.raises(CheckpointError, match="copy of a checkpoint needs"):
        saver(rank).begin_save(TrainState(5, 5, 5))


def test_files_that_rank_0_does_not_see_make_no_checkpoint(rank: Rank) -> None:
    saving = saver(rank)
    saving.begin_save(TrainState(5, 5, 5))
    directory = rank.run.get_checkpoint_dir(5, 1)
    while saving.is_writing:
        time.sleep(0.01)
    (directory / "fragments_00000.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 bytes on rank 0"):
        saving.finalize_save()
    assert find_latest_checkpoint(rank.run.checkpoints_dir) is None
