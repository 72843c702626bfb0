"""Failures that the drill does not do: a rank that raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fork_server
from launching import Environment, command, run_of
from llm_training_toolkit.runs.attempts import read_attempt_record

TRAIN = {"steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}


def test_the_error_of_a_rank_is_what_a_person_sees(
    launch_config: Callable[..., Path], ray_environment: Environment
) -> None:
    config = launch_config("raises", train=TRAIN, failures={"max_failures": 0, "log_samples": True})
    run = run_of(config)
    run.path.mkdir()
    run.sample_log_dir.write_text("in the way of the directory")
    done = fork_server.run(command(config), env=ray_environment, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank ")
    assert f"failed: FileExistsError: [Errno 17] File exists: '{run.sample_log_dir}'" in done.stderr
    assert "Traceback" not in done.stderr
    failure = read_attempt_record(run, 1)["failure"]
    assert failure["kind"] == "raised"
    assert failure["cause"] in done.stderr
    run.sample_log_dir.unlink()
    again = fork_server.run(command(config, "--json"), env=ray_environment, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["status"] == "finished"
    assert sorted(path.name for path in run.sample_log_dir.iterdir()) == [
        "attempt_2_rank_0.jsonl",
        "attempt_2_rank_1.jsonl",
    ]
