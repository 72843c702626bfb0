"""`ltt train` into an S3 bucket: killed and gone on with on another machine, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import fork_server
from launching import command, run_of
from run_results import list_losses
from s3_server import client, keys, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
STEPS = 32
SECTIONS: dict[str, dict[str, Any]] = {
    "train": {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2},
    "checkpoint": {"interval": 4, "keep_latest": 2},
}


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_server() as environment:
        yield environment


def manifest(name: str, s3: Mapping[str, str]) -> dict[str, Any]:
    """The newest one of a run in the bucket."""
    key = max(key for key in keys(f"{name}/checkpoints/", s3) if key.endswith("manifest.json"))
    found: dict[str, Any] = json.loads(
        client(s3).get_object(Bucket="bucket", Key=f"{name}/checkpoints/{key}")["Body"].read()
    )
    return found


def rows(name: str, s3: Mapping[str, str]) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl in the bucket."""
    segments = [
        client(s3).get_object(Bucket="bucket", Key=f"{name}/{key}") for key in keys(f"{name}/", s3) if "metrics" in key
    ]
    return [json.loads(line) for segment in segments for line in segment["Body"].read().splitlines()]


def wait_for_checkpoint(name: str, step: int, s3: Mapping[str, str], process: subprocess.Popen[str]) -> None:
    while not any(f"step_{step:09d}" in key and "manifest" in key for key in keys(f"{name}/checkpoints/", s3)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def test_a_run_in_a_bucket_is_killed_and_resumes_elsewhere_bit_for_bit(
    launch_config: Callable[..., Path], s3: Mapping[str, str], tmp_path: Path
) -> None:
    config = launch_config("stored", **SECTIONS, cluster={"workers": 0}, export={"at_end": True})
    cache = f"data.cache={config.parent / '.cache'}"
    fork_server.run(command(config), check=True, capture_output=True)
    stored = command(config, "run.dir=s3://bucket", cache)

    def machine(number: int) -> dict[str, str]:
        (tmp_path / str(number)).mkdir()
        return {**os.environ, **s3, "TMPDIR": str(tmp_path / str(number))}

    first, second = machine(1), machine(2)
    with fork_server.popen(stored, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=first) as process:
        wait_for_checkpoint("stored", 4, s3, process)
        process.kill()
        process.communicate()
    done = fork_server.run([*stored, "--json"], capture_output=True, env=second)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["run"] == "s3://bucket/stored"
    assert outcome["checkpoint"] == f"s3://bucket/stored/checkpoints/step_{STEPS:09d}_a2"
    [local] = run_of(config).checkpoints_dir.glob(f"step_{STEPS:09d}_a1/manifest.json")
    assert manifest("stored", s3)["files"] == json.loads(local.read_text())["files"]
    by_step = {row["step"]: row["train/loss"] for row in rows("stored", s3) if "train/loss" in row}
    assert list(by_step.values()) == list_losses(run_of(config))
    assert "model.safetensors" in keys("stored/export/", s3)

    told = fork_server.run([*stored[:3], "runs", "s3://bucket", "--json"], capture_output=True, check=True, env=second)
    [status] = json.loads(told.stdout)
    assert (status["state"], status["step"], status["path"]) == ("finished", STEPS, "s3://bucket/stored")
    words = ["generate", "s3://bucket/stored", "--prompt", "def", "--tokens", "3", "--json"]
    told = fork_server.run([*stored[:3], *words], capture_output=True, check=True, env=second)
    assert json.loads(told.stdout)["model"] == "s3://bucket/stored/export"
    left = [path for root in (first, second) for path in Path(root["TMPDIR"]).glob("llm-training-toolkit*/*")]
    assert [path.parent.parent.name for path in left] == ["1"], "only of the process that was killed"
