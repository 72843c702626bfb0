"""`ltt tune` on a real Ray cluster: a search whose worker and driver are killed finishes and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

import fork_server
from launching import Environment
from launching import command as train_command
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.config import load_config
from llm_training_toolkit.runs.attempts import read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.search.event_log import EventLog, SearchDirectory

TRIALS = 4
_LEFT = """
import json, ray
ray.init(log_to_driver=False)
table = ray.util.placement_group_table()
# One of each a cluster, for the dashboard and for demand; and what Ray Train leaves to take back the
# placement groups of a driver that was killed, which now and then outlives that (groups are counted here).
of_ray = {"TrainStateActor", "_AutoscalingCoordinatorActor", "PlacementGroupCleaner"}
actors = ray._private.state.actors()
name = lambda actor: actor["ActorClassName"]
print(json.dumps({
    "groups": [id for id, group in table.items() if group["state"] != "REMOVED"],
    "actors": sorted(
        f"{name(actor)} {id}"
        for id, actor in actors.items() if actor["State"] == "ALIVE" and name(actor) not in of_ray
    ),
    "free": ray.available_resources().get("CPU"),
}))
"""


def command(file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "llm_training_toolkit", "tune", str(file), *arguments]


def directory_of(file: Path) -> SearchDirectory:
    return SearchDirectory(file.parent / file.stem)


def what_there_is(environment: Environment) -> dict[str, Any]:
    """Placement groups, actors and CPUs that are held in the cluster, which other tests have used before."""
    asked = [sys.executable, "-c", _LEFT]
    said = fork_server.run(asked, env=environment, capture_output=True, check=True).stdout
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return found


def what_is_left(environment: Environment, before: dict[str, Any], seconds: float = 30) -> dict[str, Any]:
    """What is held more than before, once Ray has had time to take it back."""
    end = time.monotonic() + seconds
    while True:
        found = what_there_is(environment)
        more: dict[str, Any] = {kind: sorted(set(found[kind]) - set(before[kind])) for kind in ("groups", "actors")}
        more["CPUs"] = before["free"] - found["free"]
        if not any(more.values()) or time.monotonic() > end:
            return more
        time.sleep(1)


@pytest.fixture
def file(launch_config: Callable[..., Path]) -> Path:
    """A search of four trials of a tiny model with two workers each; two rates are hopeless.

    The seed puts the worst last, so that it is stopped whoever comes to a rung before whom.
    """
    base = launch_config(
        "tuned",
        train={"steps": 32, "global_batch_size": 4, "micro_batch_size": 2},
        cluster={"workers": 2},
        eval={"interval": 100},
        checkpoint={"interval": 4},
        failures={"max_failures": 0},
    )
    path = base.parent / "find.yaml"
    search = {
        "base": base.name,
        "search": {"optim.lr": {"choice": [1e-7, 1e-6, 3e-3, 1e-2]}},
        "searcher": {"name": "grid", "seed": 6},
        "scheduler": {"name": "asha", "reduction_factor": 2, "grace_period_steps": 8},
        "max_concurrent_trials": 2,
    }
    with path.open("w") as out:
        YAML().dump(search, out)
    return path


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited for {seconds} s"
        time.sleep(0.1)


def list_resumed_steps(run: RunDirectory) -> list[int]:
    """Steps of all attempts but the first."""
    rows = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [row["step"] for row in rows if row["attempt"] > 1 and "train/loss" in row]


def processes_of(run: RunDirectory) -> list[int]:
    """The workers of all its attempts."""
    return [pid for record in run.attempts_dir.glob("*.json") for pid in json.loads(record.read_text())["processes"]]


def train_alone(config: Path, runs: Path, lr: float) -> float:
    """The held-out loss at the end of a run without Ray."""
    alone = [f"optim.lr={lr}", f"run.name=at-{lr}", "cluster.workers=0", "eval.interval=32"]
    fork_server.run(train_command(config, *alone), check=True, capture_output=True)
    rows = RunDirectory(runs / f"at-{lr}").metrics_path.read_text().splitlines()
    return float([row["eval/loss"] for row in map(json.loads, rows) if "eval/loss" in row][-1])


def test_a_search_whose_trials_do_not_fit_is_refused_before_data_is_prepared(
    file: Path, ray_environment: Environment
) -> None:
    yaml = YAML()
    search = yaml.load(file)
    with file.open("w") as out:
        yaml.dump({**search, "overrides": {"cluster.workers": 4, "cluster.cpus_per_worker": 3}}, out)
    done = fork_server.run(command(file), env=ray_environment, capture_output=True)
    assert done.returncode == 1
    assert "needs 4 workers; the cluster has room for 2" in done.stderr
    assert "no autoscaler (version 2) adds nodes to it: set cluster.workers to 2" in done.stderr
    assert not directory_of(file).trials_dir.exists()


def test_a_search_survives_its_workers_and_its_driver(file: Path, ray_environment: Environment) -> None:
    found, before = directory_of(file), what_there_is(ray_environment)
    with fork_server.popen(
        command(file), env=ray_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        run = found.get_trial_run(0)
        wait_for(lambda: find_latest_checkpoint(run.checkpoints_dir), process)
        os.kill(read_attempt_record(run, 1)["pid"], signal.SIGKILL)
        wait_for(
            lambda: any(trial.state != "begun" for trial in EventLog(found.event_log_path).trials.values()), process
        )
        wait_for(lambda: EventLog(found.event_log_path).trials[0].failures, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    ended = [number for number, trial in EventLog(found.event_log_path).trials.items() if trial.state != "begun"]
    rows = {number: found.get_trial_run(number).metrics_path.read_text() for number in ended}
    assert ended

    done = fork_server.run(command(file, "--json"), env=ray_environment, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert len(answer["trials"]) == TRIALS
    assert {trial["state"] for trial in answer["trials"]} <= {"finished", "stopped"}
    assert {trial["trial"] for trial in answer["trials"] if trial["failures"]} == {"t0000"}  # tried again
    assert all(found.get_trial_run(number).metrics_path.read_text() == rows[number] for number in ended)  # not repeated
    assert answer["best"]["config"]["optim.lr"] >= 1e-3
    assert {trial["trial"]: trial["state"] for trial in answer["trials"]}["t0003"] == "stopped"
    assert 0 < answer["tokens"] < TRIALS * 32 * 4 * 64
    # The second attempt may have ended with the driver, before its first step.
    assert min(list_resumed_steps(run)) > 4, "it has gone on from its checkpoint"
    assert not {
        pid for number in range(TRIALS) for pid in processes_of(found.get_trial_run(number)) if psutil.pid_exists(pid)
    }

    assert pq.read_table(found.path / "results.parquet").num_rows == TRIALS
    assert "Plotly.newPlot" in (found.path / "report.html").read_text()
    assert len({file.parent for file in (found.path / "tb").glob("*/events*")}) == TRIALS
    assert what_is_left(ray_environment, before) == {"groups": [], "actors": [], "CPUs": 0.0}

    best = load_config(found.path / "best.yaml")
    assert best.optim.lr == answer["best"]["config"]["optim.lr"]
    undisturbed = [train_alone(found.path / "best.yaml", file.parent, lr) for lr in (3e-3, 1e-2)]
    assert answer["best"]["value"] == pytest.approx(min(undisturbed), rel=0.01)

    again = fork_server.run(command(file, "--json"), env=ray_environment, capture_output=True, check=True)
    assert json.loads(again.stdout)["best"] == answer["best"]
    assert "is finished" in again.stderr

    file.write_text(file.read_text().replace("0.01", "0.02"))
    other = fork_server.run(command(file), env=ray_environment, capture_output=True)
    assert other.returncode == 2
    assert "has begun with another space" in other.stderr
