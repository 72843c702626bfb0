"""`ltt train` into an S3 bucket on Ray: workers with directories of their own lose one and continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import fork_server
from e2e.test_s3_run import SECTIONS, STEPS, manifest, rows, wait_for_checkpoint
from launching import Environment, command
from s3_server import client, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[Mapping[str, str]]:
    with s3_server() as environment:
        yield environment


def test_workers_with_directories_of_their_own_lose_one_and_continue(
    launch_config: Callable[..., Path], ray_environment: Environment, s3: Mapping[str, str]
) -> None:
    config = launch_config("stored_on_ray", **SECTIONS, cluster={"workers": 2, "env": dict(s3)})
    stored = command(config, "run.dir=s3://bucket", f"data.cache={config.parent / '.cache'}", "--json")
    with fork_server.popen(
        stored, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**ray_environment, **s3}
    ) as process:
        wait_for_checkpoint("stored_on_ray", 4, s3, process)
        body = client(s3).get_object(Bucket="bucket", Key="stored_on_ray/attempts/0001.json")["Body"]
        os.kill(json.loads(body.read())["processes"][1], signal.SIGKILL)
        out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == STEPS
    assert [entry[0] for entry in manifest("stored_on_ray", s3)["files"]] == [
        "fragments_00000.safetensors",
        "fragments_00001.safetensors",
    ]
    steps = [row["step"] for row in rows("stored_on_ray", s3) if "train/loss" in row]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    failed, done = (
        json.loads(
            client(s3).get_object(Bucket="bucket", Key=f"stored_on_ray/attempts/{number:04d}.json")["Body"].read()
        )
        for number in (1, 2)
    )
    assert (failed["state"], failed["failure"]["rank"], done["state"]) == ("failed", 1, "finished")
    assert done["resumed"].startswith("step_")
