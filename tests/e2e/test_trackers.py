"""A run that Weights & Biases and MLflow record, in their modes without a server, over a resume."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fork_server
from launching import command, run_of

pytestmark = pytest.mark.slow


def read_wandb(folder: Path) -> list[dict[str, float]]:
    """The rows of every offline log, in the order of the starts."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in read_records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({each.key or each.nested_key[0]: json.loads(each.value_json) for each in items})
    return rows


def read_records(log: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format behind seven bytes of W&B's own: pieces in blocks of 32 KiB."""
    assert log[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(log):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", log, at + 4)  # after the checksum
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # a whole record, or its last piece
            yield whole
            whole = b""


def losses(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_two_starts_are_one_run_in_both(
    launch_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database takes ten seconds to make
    store = tmp_path / "mlruns"
    monitoring = {
        "close_timeout": "10m",
        "wandb": {"project": "tiny", "mode": "offline"},
        "mlflow": {"tracking_uri": store.as_uri(), "experiment": "tiny"},
    }
    config = launch_config("tracked", train={"steps": 4, "global_batch_size": 4}, monitoring=monitoring)
    for overrides in ([], ["train.steps=6", "--extend"]):
        done = fork_server.run(command(config, "cluster.workers=0", *overrides), env=os.environ, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "cannot be written" not in done.stdout + done.stderr
    run = run_of(config)
    wanted = losses([json.loads(line) for line in run.metrics_path.read_text().splitlines()])
    assert [step for step, _ in wanted] == [1, 2, 3, 4, 5, 6]
    assert losses(read_wandb(run.path)) == wanted

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.as_uri())
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    [recorded] = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(recorded.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == wanted
    assert recorded.data.params["train.global_batch_size"] == "4"
    assert recorded.info.status == "FINISHED"


GIVEN_UP = """
import sys, time
from pathlib import Path
from llm_training_toolkit.config.schema import WandbConfig
from llm_training_toolkit.monitoring.background_sink import BackgroundSink
from llm_training_toolkit.monitoring.trackers import TrackedRun, WandbClient

client = WandbClient(WandbConfig(project="tiny"), TrackedRun("run", Path(sys.argv[1]), "id", {}))
sink = BackgroundSink(client, close_seconds=1)
sink.write(1, {"train/loss": 1.0})
while not any(Path(sys.argv[1]).glob("wandb/*")) and sink._thread.is_alive():
    time.sleep(0.1)
try:
    sink.close()
except OSError as error:
    print(error)
"""


def test_a_service_that_hangs_keeps_no_process_alive(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
        done = subprocess.run(
            [sys.executable, "-c", GIVEN_UP, str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "did not take everything within 1 s" in done.stdout
    assert "Traceback" not in done.stderr
