"""A screen that fails, or that nobody reads, neither ends nor delays the command behind it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llm_training_toolkit.distributed.events import NoteEvent, WarningEvent
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import log_driver
from llm_training_toolkit.monitoring.terminal import TerminalStream
from llm_training_toolkit.runs.directory import RunDirectory


def say(descriptor: int, run: RunDirectory, lines: int = 20) -> float:
    """Print lines to a descriptor, with a pause after the first; the seconds that the caller waited for them."""
    with log_driver(run):
        stream = TerminalStream(descriptor)
        console = Console(stream)
        console.print_line("first")
        time.sleep(0.2)
        began = time.monotonic()
        for number in range(lines):
            console.show_event(NoteEvent(f"line {number} " + "x" * 80))
        took = time.monotonic() - began
        console.close()
    return took


def logged(run: RunDirectory) -> str:
    return run.driver_log_path.read_text()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def test_a_reader_that_is_gone_silences_the_screen_and_the_log_continues(run: RunDirectory) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    say(writer, run)
    os.close(writer)
    assert logged(run).count("the screen takes no more text ([Errno 32] Broken pipe)") == 1
    assert "line 19 " in logged(run)


def test_a_full_disk_behind_the_screen_silences_it(run: RunDirectory) -> None:
    with Path("/dev/full").open("w") as full:
        say(full.fileno(), run)
    assert "No space left on device" in logged(run)
    assert "line 19 " in logged(run)


def test_a_closed_terminal_silences_the_screen(run: RunDirectory) -> None:
    master, slave = os.openpty()
    os.close(master)
    say(slave, run)
    os.close(slave)
    assert "Input/output error" in logged(run)


def test_a_reader_that_does_not_read_delays_nothing_and_is_told_what_it_missed(run: RunDirectory) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    stream, line = TerminalStream(writer), "y" * 999 + "\n"
    began = time.monotonic()
    for _ in range(600):
        stream.write(line)
    stream.flush()
    assert time.monotonic() - began < 2
    os.set_blocking(reader, False)
    text, end = b"", time.monotonic() + 20
    while time.monotonic() < end and b"last" not in text:
        stream.write("last\n" if stream._waiting < 1000 else "")
        try:
            text += os.read(reader, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    kept = text.count(line.encode())
    assert 200 < kept < 300, "256 KiB are kept"
    assert f"… {600 - kept} messages were not taken in time: see logs/driver.log\n" in text.decode()
    os.close(reader)
    os.close(writer)


def test_at_the_end_a_slow_reader_gets_everything_and_one_that_does_not_read_costs_two_seconds() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    text = "z" * 20_000
    with TerminalStream(writer) as slow:
        slow.write(text)
        got: list[bytes] = []

        def read_slowly() -> None:
            while sum(map(len, got)) < len(text):
                time.sleep(0.1)
                got.append(os.read(reader, 4096))

        thread = threading.Thread(target=read_slowly)
        thread.start()
    thread.join(20)
    assert b"".join(got).decode() == text
    stuck = TerminalStream(writer)
    stuck.write(text)
    began = time.monotonic()
    stuck.close()
    assert 1.5 < time.monotonic() - began < 6
    os.close(reader)
    os.close(writer)


def test_a_terminal_is_recognized_and_keeps_its_bars(run: RunDirectory) -> None:
    master, slave = os.openpty()
    stream = TerminalStream(slave)
    console = Console(stream)
    assert console.terminal.is_terminal
    assert console.terminal.encoding == "utf-8"
    console.show_event(WarningEvent("größer"))
    console.close()
    assert "warning: größer" in os.read(master, 4096).decode()
    os.close(master)
    os.close(slave)
    assert not run.path.exists()


_WITHOUT_STREAMS = """
import os, sys
from llm_training_toolkit.monitoring.terminal import open_missing_streams
open_missing_streams()
with open("file", "w") as file:
    number = file.fileno()
os.write(1, b"nowhere")
print(sys.stdin.readline(), sys.stderr.write("nowhere"), flush=True)
raise SystemExit(0 if number > 2 and os.path.getsize("file") == 0 else 1)
"""


def test_a_process_without_standard_streams_gives_their_numbers_to_no_file(tmp_path: Path) -> None:
    shell = f"exec {sys.executable} -c '{_WITHOUT_STREAMS}' <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", shell], cwd=tmp_path, check=False).returncode == 0
