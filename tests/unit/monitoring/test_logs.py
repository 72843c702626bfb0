"""Logs of a run: the end of one, and messages with time, level and origin."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import RANK_LOGGER, log_driver, log_to_file, read_last_lines
from llm_training_toolkit.runs.directory import RunDirectory

_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


def test_the_last_lines_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(b"\xff" + b"".join(b"line %d\n\n" % number for number in range(10_000)) + b"no end")
    assert read_last_lines(path, 3) == ["line 9998", "line 9999", "no end"]
    path.write_text("")
    assert read_last_lines(path, 3) == []
    assert read_last_lines(tmp_path / "absent", 3) == []


def test_the_driver_logs_what_it_prints_and_the_error_that_ends_it(tmp_path: Path) -> None:
    run, screen = RunDirectory(tmp_path / "run"), io.StringIO()
    console = Console(screen)

    def drive() -> None:
        with log_driver(run):
            console.show_event(NoteEvent("resuming"))
            console.show_event(WarningEvent("disk nearly full"))
            raise LaunchError("no room")

    with pytest.raises(LaunchError):
        drive()
    console.print_line("after the run")
    lines = run.driver_log_path.read_text().splitlines()
    assert [re.sub(_TIME, "TIME", line) for line in lines[1:]] == [
        "TIME INFO driver: resuming",
        "TIME WARNING driver: disk nearly full",
        "TIME ERROR driver: LaunchError: no room",
    ]
    assert re.fullmatch(rf"{_TIME} INFO driver: command: .+", lines[0])
    assert screen.getvalue().splitlines() == ["resuming", "warning: disk nearly full", "after the run"]


def test_a_full_disk_drops_messages_and_raises_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_0.log").symlink_to("/dev/full")
    with log_to_file(RANK_LOGGER, tmp_path / "rank_0.log", "attempt 1 rank 0"):
        RANK_LOGGER.info("lost")
    RANK_LOGGER.info("to nobody")
    assert capfd.readouterr() == ("", "")
