"""`ltt runs` tells how runs stand from their files alone, whatever happened to the processes that wrote them."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llm_training_toolkit.cli.app import app
from llm_training_toolkit.runs.attempts import begin_attempt, end_attempt
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from llm_training_toolkit.runs.status import RunStatus, read_run_status, read_run_statuses
from llm_training_toolkit.runs.storage.open import open_runs_directory
from llm_training_toolkit.runs.table import build_runs_table, format_duration

_HOLD = """
import sys, time
from pathlib import Path
from llm_training_toolkit.runs.directory import RunDirectory, lock_run_directory
from llm_training_toolkit.runs.attempts import begin_attempt
run = RunDirectory(Path(sys.argv[1]))
with lock_run_directory(run):
    begin_attempt(run, {})
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run of ten steps, four of them done, two seconds each."""
    run = RunDirectory(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    run.resolved_config_path.write_text("{}")
    run.plan_path.write_text(json.dumps({"steps": 10}))
    rows = [{"step": step, "attempt": 1, "train/loss": 9.0 - step, "perf/step_seconds": 2.0} for step in range(1, 5)]
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "att')
    checkpoint = run.get_checkpoint_dir(4, 1)
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    run.get_checkpoint_dir(8, 1).mkdir()
    return run


def test_a_killed_run_is_lost_and_a_held_one_is_running(run: RunDirectory) -> None:
    arguments = [sys.executable, "-c", _HOLD, str(run.path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        running = read_run_status(run)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (running.state, running.step, running.steps, running.seconds_left) == ("running", 4, 10, 12.0)
    assert (running.loss, running.checkpoint) == (5.0, "step_000000004_a1")
    lost = read_run_status(run)
    assert (lost.state, lost.seconds_left) == ("lost", None)


def test_the_speed_is_the_median_of_the_newest_steps(run: RunDirectory) -> None:
    without = read_run_status(run)
    assert (without.tflops, without.mfu) == (None, None)
    rows = [{"step": step, "attempt": 2, "perf/tflops": 100.0 * step, "perf/mfu": 0.1 * step} for step in (1, 2, 5)]
    with run.metrics_path.open("a") as file:
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    found = read_run_status(run)
    assert (found.tflops, found.mfu) == (200.0, 0.2)
    screen = Console(file=io.StringIO(), width=200)
    screen.print(build_runs_table([found]))
    assert "200 TFLOP/s (20.0% MFU)" in screen.file.getvalue()  # type: ignore[attr-defined]


def test_steps_that_a_later_attempt_does_again_do_not_count(run: RunDirectory) -> None:
    with run.metrics_path.open("a") as file:
        rows = [{"step": step, "attempt": 2, "train/loss": 1.0} for step in range(1, 3)]
        file.write("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    run.get_checkpoint_dir(4, 1).joinpath("manifest.json").unlink()
    found = read_run_status(run)
    assert (found.step, found.loss) == (2, 1.0)


def test_a_run_that_is_claimed_before_its_first_attempt_is_starting(run: RunDirectory) -> None:
    with lock_run_directory(run):
        assert read_run_status(run).state == "starting"


@pytest.mark.parametrize("ended", ["finished", "stopped"])
def test_the_newest_attempt_says_how_a_run_ended(run: RunDirectory, ended: str) -> None:
    end_attempt(run, begin_attempt(run, {}), "failed", error="old")
    end_attempt(run, begin_attempt(run, {}), ended, step=4)
    found = read_run_status(run)
    assert (found.state, found.error) == (ended, None)


def test_a_failed_run_shows_its_error(run: RunDirectory) -> None:
    end_attempt(run, begin_attempt(run, {}), "failed", error="rank 1: [disk] full")
    found = read_run_status(run)
    assert (found.state, found.error) == ("failed", "rank 1: [disk] full")
    terminal = Console(width=200, file=io.StringIO())
    with terminal.capture() as shown_text:
        terminal.print(build_runs_table([found]))
    shown = shown_text.get()
    for part in ("one", "failed", "4/10", "5.0000", "step_000000004_a1", "rank 1: [disk] full"):
        assert part in shown


def test_in_a_pipe_every_run_is_one_whole_line(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "rank 1: " + "no space left on device " * 20 + "\nfree some space"
    end_attempt(run, begin_attempt(run, {}), "failed", error=error)
    monkeypatch.setenv("COLUMNS", "40")
    printed = CliRunner().invoke(app, ["runs", str(run.path.parent)], catch_exceptions=False).stdout
    _, row = printed.splitlines()
    assert row.startswith("one")
    assert error.replace("\n", " ") in row


def list_statuses(directory: Path) -> list[RunStatus]:
    with open_runs_directory(str(directory), print) as list_runs:
        return read_run_statuses(list_runs())


def test_only_runs_are_listed_by_name(run: RunDirectory) -> None:
    runs = run.path.parent
    (runs / ".cache").mkdir()
    (runs / "notes.txt").write_text("no run")
    (runs / "another").mkdir()
    (runs / "another" / "lock").touch()
    assert [found.name for found in list_statuses(runs)] == ["another", "one"]
    assert list_statuses(runs / "nowhere") == []


ODD_LINES = ["7", "[]", "null", '{"step": "x"}', '{"attempt": 1}', '{"step": 3, "train/loss": "low"}', '{"step": [1]}']


@pytest.mark.parametrize("line", ODD_LINES)
def test_an_odd_line_in_the_metrics_is_skipped(run: RunDirectory, line: str) -> None:
    with run.metrics_path.open("a") as file:
        file.write(f"\n{line}\n")
    assert (read_run_status(run).state, read_run_status(run).step) == ("lost", 4)


@pytest.mark.parametrize("text", ["7", "[]", '{"state": ["x"]}', '{"state": "failed", "error": 3}', "\x00"])
def test_an_odd_attempt_or_plan_breaks_no_list_of_runs(run: RunDirectory, text: str) -> None:
    run.attempts_dir.mkdir()
    (run.attempts_dir / "0001.json").write_text(text)
    (run.attempts_dir / "1.copy.json").write_text(text)
    run.plan_path.write_text(text.replace("state", "steps"))
    other = run.path.with_name("two")
    other.mkdir()
    (other / "lock").touch()
    assert [found.name for found in list_statuses(run.path.parent)] == ["one", "two"]


def test_a_run_that_cannot_be_read_is_named_and_hides_no_other(run: RunDirectory) -> None:
    other = run.path.with_name("two")
    other.mkdir()
    (other / "lock").touch()
    (run.path / "metrics.jsonl").unlink()
    (run.path / "metrics.jsonl").write_text(json.dumps({"step": 1, "goodput/step_seconds": 1, "time": 10**400}) + "\n")
    (other / "plan.json").write_text(json.dumps({"steps": 10}))
    states = {found.name: found.state for found in list_statuses(run.path.parent)}
    assert states == {"one": "unreadable", "two": "lost"}


def test_the_command_prints_json_and_needs_no_torch(run: RunDirectory) -> None:
    code = (
        "import sys; sys.argv = ['ltt', 'runs', sys.argv[1], '--json']\n"
        "from llm_training_toolkit.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path.parent)], capture_output=True, text=True, check=True
    )
    [found] = json.loads(done.stdout)
    assert (found["name"], found["state"], found["step"]) == ("one", "lost", 4)


def test_clock() -> None:
    assert [format_duration(seconds) for seconds in (0, 59.6, 61, 3_725)] == ["0:00", "1:00", "1:01", "1:02:05"]
