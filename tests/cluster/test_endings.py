"""The ends of a run or search on Ray: exit 75 and a checkpoint, and no process stays, whatever was signalled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

import fork_server
from launching import Environment, command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows
from llm_training_toolkit.search.event_log import SearchDirectory
from tiny_runs import write_corpus

pytestmark = [pytest.mark.slow]
Search = tuple[Path, SearchDirectory]
SECTIONS = {
    "train": {"steps": 20_000, "global_batch_size": 2, "micro_batch_size": 2},  # minutes
    "checkpoint": {"interval": "10m", "keep_latest": 2},
    "eval": {"interval": 100_000},
    "cluster": {"workers": 1},
}


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found: list[psutil.Process] = psutil.Process(process.pid).children(recursive=True)
    return found


def workers_of(run: RunDirectory) -> list[psutil.Process]:
    """The ranks of the newest attempt."""
    return [psutil.Process(pid) for pid in read_attempt_record(run, find_last_attempt(run))["processes"]]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def last_step(run: RunDirectory) -> int:
    return int([row["step"] for row in read_newest_rows(run.metrics_path)][-1]) if run.metrics_path.exists() else 0


def assert_stopped(run: RunDirectory) -> None:
    """The newest checkpoint is of the last step that was done, and the attempt says that it was stopped."""
    directory, attempt = find_latest_checkpoint(run.checkpoints_dir), find_last_attempt(run)
    assert directory is not None
    assert directory.name == f"step_{last_step(run):09d}_a{attempt}"
    assert read_attempt_record(run, attempt)["state"] == "stopped"


def without_ray() -> dict[str, str]:
    """The environment of a command that starts Ray itself. Ray's niceness of 15 starves workers beside other tests."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return plain | {"RAY_worker_niceness": "0"}


@pytest.fixture(scope="module")
def endless_config(launch_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes runs of 20 epochs. Of the shared corpus they would be 500, whose preparation takes a processor."""
    corpus = write_corpus(tmp_path_factory.mktemp("large") / "code", 1500)
    return partial(launch_config, **SECTIONS, data={"sources": [{"path": str(corpus), "format": "code"}]})


@pytest.mark.parametrize(("number", "own"), [(signal.SIGTERM, True), (signal.SIGHUP, False), (signal.SIGINT, False)])
def test_a_signal_to_the_whole_process_group_saves_and_leaves_no_process(
    endless_config: Callable[..., Path], ray_environment: Environment, number: signal.Signals, own: bool
) -> None:
    """`timeout`, systemd, a closed terminal and Ctrl-C reach the whole group, in which nothing of Ray may be.

    One run, which each signal resumes, with a Ray of its own or on the tests' cluster.
    """
    config = endless_config("group")
    run, environment = run_of(config), without_ray() if own else ray_environment
    before, streams = last_step(run), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with fork_server.popen(command(config), env=environment, start_new_session=True, **streams) as process:
        wait_for_step(run, before + 5, process)
        processes = descendants(process) + workers_of(run)
        assert own == any(each.name() == "raylet" for each in processes)
        assert process.pid not in {os.getpgid(each.pid) for each in processes}
        os.killpg(process.pid, number)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 75, out
    assert_stopped(run)
    assert_gone(processes)


@pytest.fixture(scope="module")
def search(endless_config: Callable[..., Path]) -> Search:
    """A search of two trials."""
    base = endless_config("searched")
    content = {
        "base": base.name,
        "search": {"optim.lr": {"choice": [1e-3, 3e-3]}},
        "searcher": {"name": "grid"},
        "scheduler": {"name": "fifo"},
        "metric": "train/loss",
    }
    path = base.with_name("search.yaml")
    with path.open("w") as file:
        YAML().dump(content, file)
    return path, SearchDirectory(base.parent / "search")


@contextmanager
def searching(search: Search, environment: Environment) -> Iterator[tuple[subprocess.Popen[str], list[RunDirectory]]]:
    """`ltt tune` of both trials, once each has done some steps."""
    path, directory = search
    runs = [directory.get_trial_run(number) for number in range(2)]
    before = [last_step(run) for run in runs]
    given = [sys.executable, "-m", "llm_training_toolkit", "tune", str(path), "--json"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with fork_server.popen(given, env=environment, start_new_session=True, **streams) as process:
        for run, step in zip(runs, before, strict=True):
            wait_for_step(run, step + 5, process)
        yield process, runs


def test_a_signal_to_the_process_group_of_a_search_saves_its_trials(
    search: Search, ray_environment: Environment
) -> None:
    with searching(search, ray_environment) as (process, runs):
        workers = [each for run in runs for each in workers_of(run)]
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert [trial["state"] for trial in json.loads(out)["trials"]] == ["begun", "begun"]
    for run in runs:
        assert_stopped(run)
    assert_gone(workers)


def test_a_second_interrupt_leaves_a_search_at_once(search: Search, ray_environment: Environment) -> None:
    """Its workers stand still, so the first interrupt alone would end nothing."""
    with searching(search, ray_environment) as (process, runs):
        workers = [each for run in runs for each in workers_of(run)]
        for each in workers:
            each.suspend()
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        assert any(line.startswith("stopping: ") for line in process.stderr)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopped at once" in err
    assert len(json.loads(out)["trials"]) == 2
    assert_gone(workers)


_CONNECTED = """
import os, sys, time
from llm_training_toolkit.launch.backend import prepare_environment
prepare_environment()
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster, get_raylet_address, watch_raylet
from llm_training_toolkit.monitoring.console import Console

def end(why):
    print(why, flush=True)
    os._exit(1)

with connect_to_cluster(Console(sys.stderr)), watch_raylet(get_raylet_address(), end):
    print("connected", flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("victim", ["command", "raylet"])
def test_a_killed_command_leaves_no_process_and_a_killed_raylet_is_named(victim: str) -> None:
    started = [sys.executable, "-c", _CONNECTED]
    with fork_server.popen(started, env=without_ray(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "connected\n"
        processes = descendants(process)
        if victim == "command":
            process.kill()
            assert process.wait(timeout=30) == -9
        else:
            next(each for each in processes if each.name() == "raylet").kill()
            assert "raylet" in process.stdout.readline()
            assert process.wait(timeout=30) == 1
    assert_gone(processes)
