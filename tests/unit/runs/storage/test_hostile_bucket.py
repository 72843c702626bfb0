"""A bucket in which a stranger writes: no command writes a file outside of its staging directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_training_toolkit.checkpoint.reader import CheckpointReader
from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.runs.status import read_run_statuses
from llm_training_toolkit.runs.storage.open import open_path, open_runs_directory, open_worker
from s3_server import below, client, silent

pytestmark = pytest.mark.slow
CHECKPOINT = "checkpoints/step_000000001_a1"


def put(key: str, body: bytes = b"a stranger's\n") -> None:
    client().put_object(Bucket="bucket", Key=key, Body=body)


def make_run(bucket: str) -> None:
    with open_worker(bucket, silent) as run:
        run.resolved_config_path.write_text("{}")
        manifest = {"format": 3, "files": [["fragments_00000.safetensors", 1, ""]]}
        path = run.get_checkpoint_dir(1, 1) / "manifest.json"
        run.storage.commit_manifest(path, json.dumps(manifest))


@pytest.mark.parametrize("kind", ["absolute", "parent", "inner parent"])
def test_an_object_that_leads_outside_is_refused_by_name(bucket: str, tmp_path: Path, kind: str) -> None:
    make_run(bucket)
    outside = tmp_path / "outside"
    put(below(bucket) + {"absolute": str(outside), "parent": "../" * 12, "inner parent": "data/" + "../" * 12}[kind]
        + ("" if kind == "absolute" else str(outside)[1:]))  # fmt: skip
    for export in (False, True):
        with pytest.raises(LaunchError, match="outside"), open_path(bucket, export=export):
            pass
    with pytest.raises(LaunchError, match="outside"), open_worker(bucket, silent):
        pass
    assert not outside.exists()


def test_other_runs_are_listed_beside_a_refused_one(bucket: str, tmp_path: Path) -> None:
    make_run(bucket)
    runs = bucket.rpartition("/")[0]
    put(below(runs) + f"evil/{tmp_path}/outside")
    put(below(runs) + "/nameless")
    put(below(runs) + "../sideways")
    said: list[str] = []
    with open_runs_directory(runs, said.append) as look:
        assert [status.name for status in read_run_statuses(look())] == ["run"]
        look()
    assert len(said) == 3, "each once"
    assert not (tmp_path / "outside").exists()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(bucket: str, tmp_path: Path) -> None:
    make_run(bucket)
    key = below(bucket) + f"{CHECKPOINT}/manifest.json"
    manifest = json.loads(client().get_object(Bucket="bucket", Key=key)["Body"].read())
    manifest["files"][0][0] = f"{'../' * 12}{str(tmp_path)[1:]}/outside"
    put(key, json.dumps(manifest).encode())
    with open_path(bucket) as run, pytest.raises(CheckpointError, match="outside"):
        CheckpointReader(run.path / CHECKPOINT)
    assert not (tmp_path / "outside").exists()


def test_directory_markers_of_a_console_change_nothing(bucket: str) -> None:
    make_run(bucket)
    for marker in ("", "data/", "checkpoints/"):
        put(below(bucket) + marker, b"")
    with open_path(bucket) as run:
        assert (run.path / "resolved.json").read_text() == "{}"
