"""A run in a bucket: what is written by one process is there for the next, and for nobody half."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_training_toolkit.checkpoint import RetentionPolicy, find_latest_checkpoint, list_complete_checkpoints
from llm_training_toolkit.checkpoint.manager import CheckpointLineage, CheckpointManager
from llm_training_toolkit.checkpoint.restore import find_latest_valid_checkpoint
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.runs.attempts import begin_attempt, find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.status import read_run_statuses
from llm_training_toolkit.runs.storage import append_log as growing
from llm_training_toolkit.runs.storage import s3_client as buckets
from llm_training_toolkit.runs.storage import s3_storage as mirror
from llm_training_toolkit.runs.storage.open import (
    create_staging_root,
    open_path,
    open_readonly,
    open_runs_directory,
    open_worker,
)
from llm_training_toolkit.runs.storage.s3_storage import RunReplacedError
from s3_server import below, client, keys, silent
from unit.checkpoint.test_manager import Model

pytestmark = pytest.mark.slow


def context(events: list[Any] | None = None) -> RunContext:
    return RunContext(0, 1, torch.device("cpu"), event_listener=(events if events is not None else []).append)


def saver(run: RunDirectory, attempt: int = 1) -> CheckpointManager:
    run_id = str(read_attempt_record(run, attempt).get("run_id", ""))
    lineage = CheckpointLineage(attempt, None, 0, 1, "c", "d", {}, {}, run_id=run_id)
    engine: Any = Model()
    return CheckpointManager(
        run, context(), engine, lineage, every_steps=1, every_seconds=None, rule=RetentionPolicy(2)
    )


def save(saving: CheckpointManager, *steps: int) -> None:
    for step in steps:
        saving.begin_save(TrainState(step, step, step))
        saving.finalize_save()


def names(run: RunDirectory) -> list[str]:
    return [path.name for path in list_complete_checkpoints(run.checkpoints_dir)]


def test_what_one_process_writes_is_there_for_the_next_on_an_empty_machine(bucket: str) -> None:
    with open_worker(bucket, silent) as run:
        run.resolved_config_path.write_text("{}")
        run.metrics_path.write_text('{"step": 1}\n')
        assert begin_attempt(run, {"host": "a"}) == 1
        save(saver(run), 1)
        assert (
            run.metrics_path.read_bytes()
            == client().get_object(Bucket="bucket", Key=f"{below(bucket)}metrics.jsonl.000000000000000")["Body"].read()
        ), "what led to a checkpoint is there with it"
        first = run.path
        assert not list(run.checkpoints_dir.rglob("*.safetensors")), "it would be there twice"
    assert not first.exists()
    with open_worker(bucket, silent) as run:
        assert run.path != first
        assert run.resolved_config_path.read_text() == "{}"
        assert begin_attempt(run, {"host": "b"}) == 2
        with run.metrics_path.open("a") as file:
            file.write('{"step": 2}\n')
        found = find_latest_valid_checkpoint(run, context())
        assert found is not None
        assert found.read("w", "weights", 0, 100).tolist() == [0.0] * 100
        run.storage.evict_checkpoint(found.directory)
        assert not list(run.checkpoints_dir.rglob("*.safetensors"))
    with open_worker(bucket, silent) as run:
        assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2]
        assert find_last_attempt(run) == 2


def test_paths_outside_of_a_stored_run_keep_their_names(bucket: str, tmp_path: Path) -> None:
    with open_worker(bucket, silent) as run:
        assert run.storage.get_uri(run.export_dir) == f"{bucket}/export"
        assert run.storage.get_uri(tmp_path / "export") == str(tmp_path / "export")


def test_two_processes_that_begin_at_once_take_two_attempts(bucket: str) -> None:
    with open_worker(bucket, silent) as one, open_worker(bucket, silent) as other:
        taken = [begin_attempt(run, {"run": number}) for number, run in enumerate((one, other, one))]
    assert taken == [1, 2, 3]


def test_retention_and_clearing_delete_in_the_bucket(bucket: str) -> None:
    with open_worker(bucket, silent) as run:
        save(saver(run), 1, 2, 3)
        client().put_object(
            Bucket="bucket", Key=f"{below(bucket)}checkpoints/step_000000009_a1/fragments_00000.safetensors", Body=b"x"
        )
        client().create_multipart_upload(Bucket="bucket", Key=f"{below(bucket)}checkpoints/step_000000009_a1/part")
    with open_worker(bucket, silent) as run:
        assert names(run) == ["step_000000002_a1", "step_000000003_a1"]
        saver(run, attempt=2)
        left = {key.split("/")[0] for key in keys(f"{below(bucket)}checkpoints/")}
        assert left == {"step_000000002_a1", "step_000000003_a1"}
        assert "Uploads" not in client().list_multipart_uploads(Bucket="bucket", Prefix=below(bucket))


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-10], lambda _content: None, lambda content: content[:-1] + b"!"]
)
def test_a_damaged_newest_checkpoint_gives_way_and_stays_where_it_is(
    bucket: str, damage: Callable[[bytes], bytes | None]
) -> None:
    with open_worker(bucket, silent) as run:
        save(saver(run), 1, 2)
    file = f"{below(bucket)}checkpoints/step_000000002_a1/fragments_00000.safetensors"
    content = damage(client().get_object(Bucket="bucket", Key=file)["Body"].read())
    if content is None:
        client().delete_object(Bucket="bucket", Key=file)
    else:
        client().put_object(Bucket="bucket", Key=file, Body=content)
    events: list[Any] = []
    with open_worker(bucket, silent) as run:
        found = find_latest_valid_checkpoint(run, context(events))
        assert found is not None
        assert found.manifest.step == 1
        assert f"{bucket}/checkpoints/step_000000002_a1/quarantine" in events[0].message
    with open_worker(bucket, silent) as run:
        assert names(run) == ["step_000000001_a1"], "it is not looked at again"
        save(saver(run, attempt=2), 2, 3)
    assert "step_000000002_a1/manifest.json" in keys(f"{below(bucket)}checkpoints/"), "nothing deletes it"


def test_the_only_checkpoint_is_never_put_aside(bucket: str) -> None:
    with open_worker(bucket, silent) as run:
        save(saver(run), 1)
    client().delete_object(
        Bucket="bucket", Key=f"{below(bucket)}checkpoints/step_000000001_a1/fragments_00000.safetensors"
    )
    with open_worker(bucket, silent) as run, pytest.raises(CheckpointError, match=f"delete {bucket} to start again"):
        find_latest_valid_checkpoint(run, context())


def test_ranks_that_outlived_their_driver_save_nothing(bucket: str) -> None:
    with open_worker(bucket, silent) as old, open_worker(bucket, silent) as new:
        begin_attempt(old, {})
        saving = saver(old)
        save(saving, 1)
        begin_attempt(new, {})
        with pytest.raises(CheckpointError, match="attempt 2 has taken over this run"):
            save(saving, 2)
        assert find_latest_checkpoint(new.checkpoints_dir) is None
        new.storage.refresh_directory(new.path)
        assert names(new) == ["step_000000001_a1"]


def test_a_run_that_was_removed_is_written_no_more(bucket: str) -> None:
    """Also if it was begun anew, with fewer attempts than the old process knows."""
    opened = open_worker(bucket, silent)
    old = opened.__enter__()
    begin_attempt(old, {})
    begin_attempt(old, {})
    saving = saver(old, attempt=2)
    save(saving, 1)
    store = buckets.S3Client(bucket)
    store.delete_objects(store.list_objects())
    with open_worker(bucket, silent) as new:
        begin_attempt(new, {})
        with pytest.raises(CheckpointError, match="was removed while it was at work"):
            save(saving, 2)
        old.metrics_path.write_text('{"step": 2}\n')
        step = old.checkpoints_dir / "step_000000001_a2"
        for store_something in (
            old.storage.flush,
            lambda: old.storage.commit_manifest(step / "manifest.json", "{}"),
            lambda: old.storage.quarantine_checkpoint(step),
            lambda: old.storage.delete_checkpoint(step),
        ):
            with pytest.raises(RunReplacedError):
                store_something()
    with pytest.raises(LaunchError, match="removed while this process worked on it"):
        opened.__exit__(None, None, None)
    assert set(store.list_objects()) == {"attempts/0001.json"}


def test_rows_that_a_late_process_appends_do_not_stop_its_successor(bucket: str) -> None:
    with open_worker(bucket, silent) as late, open_worker(bucket, silent) as run:
        for each, row in ((late, '{"step": 1}\n'), (run, '{"step": 2}\n')):
            each.metrics_path.write_text(row)
            each.storage.flush()
    with open_readonly(bucket) as found:
        assert found.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_store_that_is_away_for_a_while_costs_nothing(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_RETRY_INTERVAL", 0.1)
    with open_worker(bucket, silent) as run:
        saving = saver(run)
        with away(monkeypatch) as back:
            saving.begin_save(TrainState(1, 1, 1))
            assert saving.is_writing
            back()
            saving.finalize_save()
        assert names(run) == ["step_000000001_a1"]


def test_a_store_that_stays_away_fails_the_checkpoint_in_words(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_RETRY_TIMEOUT", 0.0)
    with open_worker(bucket, silent) as run:
        save(saver(run), 1)
        saving = saver(run)
        with away(monkeypatch):
            saving.begin_save(TrainState(2, 2, 2))
            said = f"checkpoint {bucket}/checkpoints/step_000000002_a1 could not be written: rank 0: nobody answers"
            with pytest.raises(CheckpointError, match=said):
                saving.finalize_save()
    with open_worker(bucket, silent) as run:
        assert names(run) == ["step_000000001_a1"]


@contextmanager
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """The store does not answer until it is called back: its client goes to a port where nobody listens."""
    known = buckets.S3Client._build_full_key
    refused = threading.Event()

    def key(self: buckets.S3Client, relative: str) -> str:
        if not refused.is_set():
            raise buckets.StorageError("nobody answers")
        return known(self, relative)

    monkeypatch.setattr(buckets.S3Client, "_build_full_key", key)
    try:
        yield refused.set
    finally:
        monkeypatch.setattr(buckets.S3Client, "_build_full_key", known)


def test_growing_files_become_few_segments_and_their_end_is_read(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "_MOST_SEGMENTS", 4)
    monkeypatch.setattr(mirror, "_TAIL", 30)
    lines = [f'{{"step": {step}}}\n' for step in range(10)]
    with open_worker(bucket, silent) as run:
        for line in lines:
            with run.metrics_path.open("a") as file:
                file.write(line)
            run.storage.flush()
        with run.metrics_path.open("a") as file:
            file.write("half a li")
        run.storage.flush()
        assert len(keys(f"{below(bucket)}metrics.jsonl")) == 4
    with open_worker(bucket, silent) as run:
        assert run.metrics_path.read_text() == "".join(lines[-2:]) + "half a li"


def test_an_export_takes_the_place_of_the_one_before_and_is_told_of_last(bucket: str) -> None:
    def export(run: RunDirectory, *files: str) -> None:
        for path in run.export_dir.glob("*"):
            path.unlink()
        run.export_dir.mkdir(exist_ok=True)
        for name in files:
            (run.export_dir / name).write_text(name)
        (run.export_dir / "training.json").write_text(json.dumps(files))

    with open_worker(bucket, silent) as run:
        run.resolved_config_path.write_text("{}")
        export(run, "model-1-of-2", "model-2-of-2")
    with open_worker(bucket, silent) as run:
        assert [path.name for path in run.export_dir.iterdir()] == ["training.json"], (
            "weights come when they are asked for"
        )
        export(run, "model")
    assert keys(f"{below(bucket)}export/") == ["model", "training.json"]
    with open_path(bucket, export=True) as opened:
        assert (opened.path / "export" / "model").read_text() == "model"
    with open_path(f"{bucket}/export", export=True) as opened:
        assert (opened.path / "model").read_text() == "model"


def test_runs_in_a_bucket_are_listed_as_they_stand(bucket: str) -> None:
    with open_worker(bucket, silent) as run:
        run.resolved_config_path.write_text("{}")
        run.metrics_path.write_text('{"step": 3, "attempt": 1, "train/loss": 2.5}\n')
        begin_attempt(run, {})
        run.storage.flush()
        with open_runs_directory(bucket.rpartition("/")[0], silent) as look:
            [found] = read_run_statuses(look())
            assert (found.name, found.path, found.state, found.step) == ("run", bucket, "lost", 3)
            with run.metrics_path.open("a") as file:
                file.write('{"step": 4, "attempt": 1, "train/loss": 2.4}\n')
            run.storage.flush()
            assert read_run_statuses(look())[0].step == 4


def test_what_the_dead_left_is_removed(bucket: str) -> None:
    (create_staging_root() / "dead").mkdir()
    (create_staging_root() / "dead" / ".lock").touch()
    with open_worker(bucket, silent) as run:
        assert list(create_staging_root().iterdir()) == [run.path.parent]
    assert not list(create_staging_root().iterdir())


def test_an_address_below_no_run_is_said(bucket: str) -> None:
    with pytest.raises(LaunchError, match="NoSuchBucket"), open_worker("s3://other/run", silent):
        pass
    assert Path(bucket)  # nothing was made of it
