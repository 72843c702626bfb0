"""A run ends as it was asked to, whatever becomes of its screen: exit 75 and a checkpoint of the current step."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from tiny_runs import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SECTIONS = {
    "train": {"steps": 100_000, "global_batch_size": 2, "micro_batch_size": 2},
    "checkpoint": {"interval": 2, "keep_latest": 2},
    "eval": {"interval": 100_000},
}


class Screen(NamedTuple):
    """What a command writes to, and how that fails once the run trains."""

    descriptor: int
    fail: Callable[[], None]


def closed_pipe() -> Screen:
    """`ltt train … | head`, or a `tee` that Ctrl-C has ended."""
    reader, writer = os.pipe()
    return Screen(writer, lambda: os.close(reader))


def unread_pipe() -> Screen:
    """A pager that stands still: a line for each checkpoint fills the pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    return Screen(writer, lambda: os.set_blocking(reader, False))


def closed_terminal() -> Screen:
    master, slave = os.openpty()
    return Screen(slave, lambda: os.close(master))


def full_disk() -> Screen:
    return Screen(os.open("/dev/full", os.O_WRONLY), lambda: None)


def last_row(run: RunDirectory) -> dict[str, float]:
    lines = run.metrics_path.read_text().splitlines()
    row: dict[str, float] = json.loads(lines[-1])
    return row


def assert_stopped(run: RunDirectory) -> None:
    """The newest checkpoint is of the last step that was done, and the attempt says that it was stopped."""
    directory, attempt = find_latest_checkpoint(run.checkpoints_dir), find_last_attempt(run)
    assert directory is not None
    assert directory.name == f"step_{int(last_row(run)['step']):09d}_a{attempt}"
    assert read_attempt_record(run, attempt)["state"] == "stopped"


@pytest.fixture(scope="module")
def endless_config(launch_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes runs of 100 epochs. Of the shared corpus they would be 2,400, whose preparation takes a processor."""
    corpus = write_corpus(tmp_path_factory.mktemp("large") / "code", 1500)
    data = {"sources": [{"path": str(corpus), "format": "code"}]}
    return partial(launch_config, **SECTIONS, cluster={"workers": 0}, data=data)


@pytest.mark.parametrize(
    ("screen", "number", "times"),
    [
        (closed_pipe, signal.SIGINT, 1),
        (closed_terminal, signal.SIGHUP, 1),
        (full_disk, signal.SIGTERM, 1),
        (unread_pipe, signal.SIGTERM, 200),
    ],
)
def test_a_screen_that_fails_neither_ends_nor_delays_a_run(
    endless_config: Callable[..., Path], screen: Callable[[], Screen], number: signal.Signals, times: int
) -> None:
    """One run, which each case resumes."""
    config = endless_config("endings")
    run, shown = run_of(config), screen()
    before = int(last_row(run)["step"]) if run.metrics_path.exists() else 0
    with fork_server.popen(command(config), stdout=shown.descriptor, stderr=shown.descriptor) as process:
        os.close(shown.descriptor)
        wait_for_step(run, before + 1, process)
        shown.fail()
        wait_for_step(run, before + 100, process)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.002 * (times > 1))
        assert process.wait(timeout=120) == 75
    assert_stopped(run)


_LIMITED = """
import resource, sys
from llm_training_toolkit.cli.app import main
limit = int(sys.argv.pop())
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv[0] = "ltt"
main()
"""


@pytest.mark.parametrize(("verb", "limit"), [("prepare", 0), ("prepare", 3_000), ("train", 0), ("train", 12_000)])
def test_a_disk_that_fills_while_data_is_prepared_is_said_in_one_sentence(
    launch_config: Callable[..., Path], tmp_path: Path, verb: str, limit: int
) -> None:
    """The kernel refuses to let a file grow beyond the limit: tokens, tokenizer, documents."""
    config = launch_config("full", **SECTIONS, cluster={"workers": 0})
    given = [str(config), f"data.cache={tmp_path / 'cache'}", f"run.dir={tmp_path / 'runs'}", str(limit)]
    done = fork_server.run([sys.executable, "-c", _LIMITED, verb, *given], capture_output=True)
    assert done.returncode == 1, done.stdout + done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path) in error
    assert error.endswith(
        "File too large: the file may not grow further: raise the limit (ulimit -f), then give the same command again"
    )
    assert "Traceback" not in done.stderr


def test_a_drill_that_is_stopped_saves_the_run_under_way(endless_config: Callable[..., Path]) -> None:
    config = endless_config("drill-stopped")
    given = [sys.executable, "-m", "llm_training_toolkit", "drill", str(config), "--kills", "1"]
    with fork_server.popen(given, stderr=subprocess.PIPE, start_new_session=True) as process:
        while not (found := list(config.parent.glob("drill-stopped-drill-*/undisturbed/metrics.jsonl"))):
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        run = RunDirectory(found[0].parent)
        wait_for_step(run, 5, process)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "stopped: " in err
    assert_stopped(run)
