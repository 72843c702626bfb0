"""The run directory: one holder at a time, attempts without gaps, files that are never half written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.attempts import begin_attempt, end_attempt
from llm_training_toolkit.runs.directory import (
    RunDirectory,
    check_run,
    collect_environment,
    lock_run_directory,
    parse_checkpoint_name,
)

_IMPORTS = """
import sys, time
from pathlib import Path
from llm_training_toolkit.runs.attempts import *
from llm_training_toolkit.runs.directory import *
"""
_HOLD = """
with lock_run_directory(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""
_ATTEMPTS = """
for _ in range(5):
    print(begin_attempt(RunDirectory(Path(sys.argv[1])), {}), flush=True)
"""
_REWRITE = """
print("writing", flush=True)
while True:
    for letter in "ab":
        write_atomically(Path(sys.argv[1]), letter * 100_000)
"""


def start(script: str, path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _IMPORTS + script, path], stdout=subprocess.PIPE, text=True)


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run at `path`."""
    with start(_HOLD, path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "a run")


def test_a_run_held_by_another_process_is_refused_with_its_holder(run: RunDirectory) -> None:
    with holder(run.path) as other:
        with (
            pytest.raises(LaunchError, match=f"is already running \\(process {other.pid} on .*run.name"),
            lock_run_directory(run),
        ):
            pytest.fail("two processes hold the run")
        with lock_run_directory(RunDirectory(run.path.with_name("another"))):
            pass


def test_a_refused_claim_does_not_disturb_the_holder(run: RunDirectory) -> None:
    with holder(run.path):
        for _ in range(2):
            with pytest.raises(LaunchError, match="already running"), lock_run_directory(run):
                pytest.fail("two processes hold the run")


def test_a_claim_ends_with_a_killed_holder(run: RunDirectory) -> None:
    with holder(run.path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait()
        with lock_run_directory(run):
            assert (run.path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_claim_ends_with_its_block_also_after_an_error(run: RunDirectory) -> None:
    with pytest.raises(ValueError, match="inside"), lock_run_directory(run):
        raise ValueError("inside")
    with holder(run.path):
        pass


def test_a_run_that_was_removed_or_begun_anew_is_lost_to_its_holder(run: RunDirectory) -> None:
    run.check_lock()  # of a process that did not lock it
    with lock_run_directory(run) as locked:
        locked.check_lock()
        lock = run.path / "lock"
        lock.write_bytes(lock.rename(run.path / "moved").read_bytes())  # as if its number changed at each look
        locked.check_lock()
        (run.path / "moved").rename(lock)
        run.path.rename(run.path.with_name("removed"))
        with pytest.raises(LaunchError, match="leaves the directory as it is"):
            locked.check_lock()
        with lock_run_directory(run) as anew:
            anew.check_lock()
            with pytest.raises(LaunchError, match="leaves the directory as it is"):
                locked.check_lock()


def test_a_run_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LaunchError, match="cannot be written: Not a directory"),
        lock_run_directory(RunDirectory(tmp_path / "file/r")),
    ):
        pytest.fail("claimed a directory that does not exist")


def test_attempts_count_from_one_and_record_how_they_went(run: RunDirectory) -> None:
    assert [begin_attempt(run, {"workers": 2}) for _ in range(3)] == [1, 2, 3]
    assert sorted(path.name for path in run.attempts_dir.iterdir()) == ["0001.json", "0002.json", "0003.json"]
    lost = json.loads((run.attempts_dir / "0002.json").read_text())
    assert (lost["attempt"], lost["state"], lost["workers"]) == (2, "lost", 2)
    running = json.loads((run.attempts_dir / "0003.json").read_text())
    assert (running["attempt"], running["state"], running["workers"]) == (3, "running", 2)
    end_attempt(run, 3, "failed", error="disk", step=7)
    ended = json.loads((run.attempts_dir / "0003.json").read_text())
    assert ended == running | {"state": "failed", "error": "disk", "step": 7, "ended": ended["ended"]}
    assert ended["ended"] >= ended["started"]


def test_attempts_beyond_four_digits_keep_counting(run: RunDirectory) -> None:
    run.attempts_dir.mkdir(parents=True)
    (run.attempts_dir / "9999.json").write_text("{}")
    assert [begin_attempt(run, {}) for _ in range(2)] == [10_000, 10_001]


def test_many_processes_share_no_attempt_and_leave_no_gap(run: RunDirectory) -> None:
    processes = [start(_ATTEMPTS, run.path) for _ in range(8)]
    numbers = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0] * 8
    assert sorted(numbers) == list(range(1, 41))
    records = sorted(json.loads(path.read_text())["attempt"] for path in run.attempts_dir.glob("*.json"))
    assert records == sorted(numbers)


def test_writing_replaces_the_file_and_makes_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "old")
    write_atomically(path, "größer")
    assert path.read_text() == "größer"
    assert list(path.parent.iterdir()) == [path]


def test_a_text_that_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_atomically(path, "x" * 5_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for wait in (0.0, 0.01, 0.03):
        with start(_REWRITE, path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            deadline = time.monotonic() + 20
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(wait)
            process.kill()
        assert path.read_text() in {"a" * 100_000, "b" * 100_000}


@given(step=st.integers(0, 999_999_999), attempt=st.integers(1, 10**6))
def test_the_name_of_a_checkpoint_carries_step_and_attempt(step: int, attempt: int) -> None:
    assert parse_checkpoint_name(RunDirectory(Path("r")).get_checkpoint_dir(step, attempt)) == (step, attempt)


@given(st.lists(st.tuples(st.integers(0, 999_999_999), st.integers(1, 9)), max_size=10))
def test_names_of_checkpoints_sort_by_step(places: list[tuple[int, int]]) -> None:
    run = RunDirectory(Path("r"))
    assert sorted(run.get_checkpoint_dir(*place).name for place in places) == [
        run.get_checkpoint_dir(*place).name for place in sorted(places)
    ]


@pytest.mark.parametrize(
    "name",
    ["", "step_1_a1", "step_000000001", "step_000000001_a", "quarantine_1_step_000000001_a1", "step_000000001_a1.tmp"],
)
def test_other_names_are_no_checkpoints(name: str) -> None:
    assert parse_checkpoint_name(Path("r") / name) is None


def test_a_run_is_known_by_its_resolved_configuration(tmp_path: Path) -> None:
    (tmp_path / "resolved.json").write_text("{}")
    assert check_run(RunDirectory(tmp_path)) == RunDirectory(tmp_path)


def test_a_path_without_a_run_is_an_error_that_says_what_to_name(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"^{path}: no run there .*name a run's directory"):
            check_run(RunDirectory(path))


def test_the_environment_names_versions_and_machine_and_is_json() -> None:
    found = json.loads(json.dumps(collect_environment()))
    assert found["versions"]["torch"].startswith("2.")
    assert found["python"] == sys.version.split()[0]
    assert found["cpus"] == os.cpu_count()


def test_an_attempt_that_was_cut_short_as_it_began_is_closed_like_any_other(run: RunDirectory) -> None:
    begin_attempt(run, {})
    (run.attempts_dir / "0002.json").write_text('{"attempt": 2, "sta')
    assert begin_attempt(run, {}) == 3
    states = [json.loads(path.read_text())["state"] for path in sorted(run.attempts_dir.iterdir())]
    assert states == ["lost", "lost", "running"]
    (run.attempts_dir / "0003.json").write_text("")
    end_attempt(run, 3, "failed", error="disk")
    assert json.loads((run.attempts_dir / "0003.json").read_text())["error"] == "disk"


def test_a_file_system_without_locks_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(LaunchError, match=r"keeps no locks .No locks available."), lock_run_directory(run):
        pytest.fail("claimed without a lock")
