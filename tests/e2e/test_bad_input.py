"""What a person may get wrong: each a clear message, the right exit code, and nothing lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fork_server
from launching import command, run_of, wait_for_step
from llm_training_toolkit.checkpoint import find_latest_checkpoint

INLINE = {"train": {"steps": 4, "global_batch_size": 4, "micro_batch_size": 2}, "cluster": {"workers": 0}}
WITHOUT_CLUSTER = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def refused(config: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and standard error of a start that is meant to be refused."""
    done = fork_server.run(command(config, *arguments), capture_output=True, env=WITHOUT_CLUSTER, timeout=900)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_a_source_that_is_not_there_is_named(launch_config: Callable[..., Path]) -> None:
    config = launch_config("no_source", **INLINE)
    code, said = refused(config, "data.sources.0.path=nowhere/at/all")
    assert code == 1
    assert "nowhere/at/all" in said


def test_sources_that_leave_nothing_to_train_on_end_the_preparation(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "empty.py").write_text("  \n")
    code, said = refused(launch_config("nothing", **INLINE), f"data.sources.0.path={tmp_path}")
    assert code == 1
    assert str(tmp_path) in said


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    code, said = refused(tmp_path)
    assert code == 2
    assert str(tmp_path) in said


def test_a_batch_smaller_than_the_workers_is_refused(launch_config: Callable[..., Path]) -> None:
    code, said = refused(launch_config("small_batch"), "train.global_batch_size=1", "cluster.workers=2")
    assert code == 2
    assert "2 workers share 1 sequence," in said
    assert "train.global_batch_size" in said


def test_more_workers_than_the_machine_has_are_refused_before_anything_starts(
    launch_config: Callable[..., Path],
) -> None:
    config = launch_config("crowd")
    code, said = refused(config, "cluster.workers=500", "train.global_batch_size=500")
    assert code == 2
    assert "cluster.workers = 500" in said
    assert "this machine has" in said
    assert not run_of(config).dataset_info_path.exists()


def test_a_run_directory_that_cannot_be_written_is_named(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, said = refused(launch_config("no_directory", **INLINE), f"run.dir={tmp_path / 'file'}")
    assert code == 1
    assert str(tmp_path / "file") in said


_FROM_A_DELETED_DIRECTORY = """
import os, sys, tempfile
from llm_training_toolkit.cli.app import main
os.chdir(folder := tempfile.mkdtemp())
os.rmdir(folder)
main()
"""


@pytest.mark.parametrize("verb", ["plan", "train", "runs", "doctor"])
def test_a_deleted_current_directory_is_said(launch_config: Callable[..., Path], verb: str) -> None:
    given = [str(launch_config("deleted", **INLINE))] if verb in {"plan", "train"} else []
    done = fork_server.run([sys.executable, "-c", _FROM_A_DELETED_DIRECTORY, verb, *given], capture_output=True)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the current directory has been deleted: change to one that exists (cd), then give the same command "
        "again\n"
    )


@pytest.mark.slow
def test_a_run_outlives_its_configuration_file_and_current_directory(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = launch_config("outlives", **INLINE, export={"at_end": True})
    folder = tmp_path / "checkout"
    folder.mkdir()
    given = command(config, "train.steps=300")
    with fork_server.popen(given, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        wait_for_step(run_of(config), 2, process)
        config.unlink()
        folder.rmdir()
        out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    assert f"ltt generate {run_of(config).path}/export" in out
    assert "Traceback" not in out


_WITHOUT_STREAMS = """
import os, sys
from llm_training_toolkit.cli.app import main
for name in sys.argv.pop(1).split(","):
    os.close(("stdin", "stdout", "stderr").index(name))
    setattr(sys, name, None)  # as Python starts without it
main()
"""


@pytest.mark.parametrize("closed", ["stdout", "stderr", "stdin,stdout,stderr"])
def test_a_command_without_standard_streams_works(launch_config: Callable[..., Path], closed: str) -> None:
    """`ltt … <&- >&- 2>&-`, as some schedulers start it."""
    config = launch_config(closed.replace(",", "-"), **INLINE)
    for verb in (["train", str(config)], ["runs", str(config.parent)], ["runs", str(config.parent), "--json"]):
        done = fork_server.run([sys.executable, "-c", _WITHOUT_STREAMS, closed, *verb], capture_output=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        assert bool(done.stdout) == ("stdout" not in closed)
    assert find_latest_checkpoint(run_of(config).checkpoints_dir) is not None


@pytest.mark.slow
def test_a_second_start_of_a_running_run_is_refused(launch_config: Callable[..., Path]) -> None:
    config = launch_config("twice", **INLINE)
    first = command(config, "train.steps=2000")
    with fork_server.popen(first, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(run_of(config), 2, process)
        code, said = refused(config, "train.steps=2000")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=900)
    assert code == 1
    assert f"already running (process {process.pid}" in said
    assert process.returncode == 75


@pytest.mark.slow
def test_a_full_disk_at_a_checkpoint_ends_the_run_with_words_and_keeps_what_was_saved(
    launch_config: Callable[..., Path], tmp_path: Path
) -> None:
    mounted = tmp_path / "small"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(mounted)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        config = launch_config("full_disk", **INLINE)
        cache = tmp_path / "cache"
        arguments = [f"run.dir={mounted}", f"data.cache={cache}", "checkpoint.interval=1", "checkpoint.keep_latest=100"]
        code, said = refused(config, *arguments, "train.steps=100")
        kept = sorted(path.name for path in (mounted / "full_disk" / "checkpoints").iterdir())
        assert code == 1
        assert "No space left on device" in said
        assert "could not be written" in said
        assert kept
        assert all((mounted / "full_disk" / "checkpoints" / name / "manifest.json").exists() for name in kept)
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
