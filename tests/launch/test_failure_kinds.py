"""Failures that the drill does not do: storage that takes no more while a checkpoint is written, a rank that raises."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.conftest import Environment, command, run_of
from llm_training_toolkit.runs import attempt_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
TRAIN = {"steps": 30, "global_batch": 4, "micro_batch": 2}
SMALLER_THAN_A_CHECKPOINT = 200_000
"""Bytes: all other files that a run writes are smaller, its fragments are 1.5 MB."""


def limit_files() -> None:
    """The kernel refuses to let a file grow further, as it does on a full disk or beyond a quota."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLER_THAN_A_CHECKPOINT, SMALLER_THAN_A_CHECKPOINT))


def test_storage_that_takes_no_more_ends_the_run_in_words_and_leaves_the_checkpoints_before_whole(
    launch_config: Callable[..., Path],
) -> None:
    sections = {"train": TRAIN, "checkpoint": {"every": 10, "keep": 3}, "cluster": {"workers": 0}}
    config = launch_config("full-disk", **sections)
    run = run_of(config)
    first = subprocess.run(command(config, "train.steps=10"), capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    longer = command(config, "--extend")
    full = subprocess.run(longer, capture_output=True, text=True, check=False, preexec_fn=limit_files)
    assert full.returncode == 1
    for words in ("step_000000020_a2 could not be written", "File too large", "The checkpoints before it are whole"):
        assert words in full.stderr
    assert "Traceback" not in full.stderr
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_000000010_a1"]
    again = subprocess.run(longer, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resuming from step_000000010_a1" in again.stdout


@pytest.mark.cluster
def test_the_error_of_a_rank_is_what_a_person_sees(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("raises", train=TRAIN, failures={"max": 0, "ledger": True})
    run = run_of(config)
    run.path.mkdir()
    run.ledger.write_text("in the way of the directory")
    done = subprocess.run(command(config), env=ray_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank ")
    assert f"failed: FileExistsError: [Errno 17] File exists: '{run.ledger}'" in done.stderr
    assert "Traceback" not in done.stderr
    failure = attempt_record(run, 1)["failure"]
    assert failure["kind"] == "raised"
    assert failure["cause"] in done.stderr
    run.ledger.unlink()
    again = subprocess.run(command(config, "--json"), env=ray_environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "finished"
    assert sorted(path.name for path in run.ledger.iterdir()) == [
        "attempt_2_rank_0.jsonl",
        "attempt_2_rank_1.jsonl",
    ]
