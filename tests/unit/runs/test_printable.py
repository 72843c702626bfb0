"""Control characters of file names, run files and models never reach a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console as Terminal

from llm_training_toolkit.distributed.events import SampleEvent
from llm_training_toolkit.monitoring.console import format_sample
from llm_training_toolkit.runs.printable import escape_control_characters
from llm_training_toolkit.runs.status import RunStatus
from llm_training_toolkit.runs.table import build_runs_table

HOSTILE = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202e"


@given(st.text())
def test_nothing_is_left_that_a_terminal_obeys(text: str) -> None:
    escaped = escape_control_characters(text)
    assert all(character in "\n\t" or character >= " " for character in escaped)
    assert not set(escaped) & {chr(code) for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F))}
    assert escape_control_characters(escaped) == escaped


def test_ordinary_text_is_unchanged() -> None:
    assert escape_control_characters("漢字 é 😀\n\tx\\") == "漢字 é 😀\n\tx\\"


def test_runs_are_listed_without_their_control_characters_and_markup() -> None:
    terminal = Terminal(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    status = RunStatus("a[bold]b" + HOSTILE, "path", "failed", 1, 2, None, None, HOSTILE, HOSTILE, {})
    with terminal.capture() as shown:
        terminal.print(build_runs_table([status]))
    assert "\x1b]" not in shown.get()
    assert "\x1b[2J" not in shown.get()
    assert "a[bold]b\\x1b]0;pwned" in shown.get()


def test_what_a_model_wrote_is_shown_without_them() -> None:
    shown = format_sample(SampleEvent("title", HOSTILE, HOSTILE, HOSTILE))
    assert not any("\x1b" in str(part) for part in shown)


def test_an_error_on_a_terminal_has_none(tmp_path: Path) -> None:
    main, other = pty.openpty()
    command = [sys.executable, "-m", "llm_training_toolkit", "plan", str(tmp_path / HOSTILE)]
    with subprocess.Popen(command, stdout=other, stderr=other, stdin=subprocess.DEVNULL) as process:
        os.close(other)
        said = b""
        while piece := _read(main):
            said += piece
    os.close(main)
    assert process.returncode == 2
    assert b"no such file" in said
    assert b"\x1b" not in said.replace(b"\\x1b", b"")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1000)
    except OSError:  # how the end of a terminal is told
        return b""
