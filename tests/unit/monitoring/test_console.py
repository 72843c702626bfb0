"""The screen: bars where there is a terminal, few plain lines where there is none."""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.distributed.events import (
    CheckpointEvent,
    EvalEvent,
    NoteEvent,
    RungEvent,
    SampleEvent,
    StepEvent,
    WarningEvent,
    WorkerErrorEvent,
)
from llm_training_toolkit.monitoring.console import Console, RemainingTimeEstimator, format_sample, format_step_line


def step(number: int, steps: int = 1000, **changed: Any) -> StepEvent:
    event = StepEvent(number, steps, 2.34567, 3e-4, 12345.6, seconds=0.5, time=1e9 + 0.5 * number, tflops=0.04567)
    return replace(event, **changed)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def written(act: Callable[[Console], None]) -> list[str]:
    """The lines in a file that is no terminal."""
    file = io.StringIO()
    console = Console(file)
    act(console)
    console.close()
    return file.getvalue().splitlines()


def test_a_step_line_has_step_loss_rate_speed_and_time_left() -> None:
    line = format_step_line(step(7), 83.6)
    assert line == "step    7/1000  loss 2.3457  lr 3.00e-04  12,346 tokens/s  0.0457 TFLOP/s  1:24 left"


def test_a_step_line_has_the_share_of_a_known_peak() -> None:
    line = format_step_line(step(7, tflops=376.4, mfu=0.3806), 83.6)
    assert line.endswith("12,346 tokens/s  376 TFLOP/s (38.1% MFU)  1:24 left")


def test_a_step_line_without_a_known_time_left_says_nothing_of_it() -> None:
    assert format_step_line(step(1), None).endswith("tokens/s  0.0457 TFLOP/s")


@pytest.mark.parametrize(
    ("seconds", "clock"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3599.7, "1:00:00"), (90_061, "25:01:01")],
)
def test_time_left_reads_as_a_clock(seconds: float, clock: str) -> None:
    assert format_step_line(step(1), seconds).endswith(f"  {clock} left")


@given(st.floats(0.01, 100), st.floats(0, 10), st.floats(0, 1000))
def test_time_left_is_right_after_ten_steps_whatever_the_first_one_took(
    seconds: float, between: float, first: float
) -> None:
    remaining = RemainingTimeEstimator()
    remaining.add_step(1e9, first)
    assert remaining.estimate_seconds(100) is None
    for number in range(1, 11):
        remaining.add_step(1e9 + number * (seconds + between), seconds)
    assert remaining.estimate_seconds(100) == pytest.approx(100 * (seconds + between), rel=1e-3)


def test_the_length_of_a_run_is_said_once_after_its_first_steps() -> None:
    def act(console: Console) -> None:
        for number in range(1, 40):
            console.show_event(step(number))

    said = [line for line in written(act) if "on this machine" in line]
    assert said == ["about 8:14 left on this machine, by its first 10 steps"]


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(allow_nan=True, allow_infinity=True))
def test_step_lines_of_a_run_keep_their_columns(steps: int, done: int, loss: float) -> None:
    done = min(done, steps)
    line = format_step_line(step(done, steps, loss=loss), None)
    assert line.index("  loss ") == len(f"step {steps}/{steps}")


def test_without_a_terminal_a_stage_appears_once() -> None:
    def act(console: Console) -> None:
        for done in range(50):
            console.update_stage("reading", done, 0)
        console.update_stage("packing", 0, 10)
        console.update_stage("packing", 10, 10)
        console.update_stage("reading", 50, 50)

    assert written(act) == ["reading", "packing"]


def test_without_a_terminal_step_lines_are_rare_but_the_last_is_there() -> None:
    def act(console: Console) -> None:
        for number in range(1, 1001):
            console.show_event(step(number))

    lines = written(act)
    assert 2 <= len(lines) <= 4
    assert lines[-1].startswith("step 1000/1000  loss 2.3457")


def test_without_a_terminal_there_is_not_one_control_character() -> None:
    def act(console: Console) -> None:
        console.update_stage("reading", 1, 2)
        console.show_event(step(1))
        console.show_event(WarningEvent("disk nearly full"))
        console.show_event(EvalEvent(1, 1.5, 0.75))
        console.show_event(SampleEvent("t", "a", "b", "c"))

    assert all(line.isprintable() for line in written(act))


def test_events_become_lines() -> None:
    def act(console: Console) -> None:
        console.show_event(NoteEvent("resuming at step 3"))
        console.show_event(WarningEvent("disk nearly full"))
        console.show_event(EvalEvent(5, 1.5, 0.75))
        console.show_event(CheckpointEvent(5, "runs/a/checkpoints/step_000000005_a1"))

    assert written(act) == [
        "resuming at step 3",
        "warning: disk nearly full",
        "step 5: held-out loss 1.5000, 0.750 bits per byte",
        "step 5: checkpoint runs/a/checkpoints/step_000000005_a1",
    ]


def test_a_long_message_stays_on_one_line() -> None:
    assert written(lambda console: console.show_event(NoteEvent("x " * 500))) == ["x " * 500]


def test_a_sample_shows_what_was_given_and_what_was_written() -> None:
    event = SampleEvent("infilling", "def f():\n", "[/x] pass\n", "f()")
    assert written(lambda console: console.show_event(event)) == ["", "infilling:", "def f():", "[/x] pass", "f()"]
    assert [part.plain for part in format_sample(event)] == ["def f():\n", "[/x] pass\n", "f()"]


def test_events_for_the_driver_alone_have_no_line() -> None:
    def act(console: Console) -> None:
        console.show_event(RungEvent(3))
        console.show_event(WorkerErrorEvent(1, "train", "ValueError", "x", final=False, helped=False))

    assert written(act) == []


@pytest.mark.parametrize("text", ["[/closing]", "[bold]", "list[int]", "{curly}", "%s", "\\"])
def test_text_that_looks_like_markup_is_shown_as_it_is(text: str) -> None:
    def act(console: Console) -> None:
        console.show_event(NoteEvent(text))
        console.update_stage(text, 1, 2)

    assert written(act) == [text, text]
    assert text in on_a_terminal(act)


def test_closing_twice_and_printing_after_closing_is_fine() -> None:
    def act(console: Console) -> None:
        console.update_stage("reading", 1, 2)
        console.close()
        console.close()
        console.update_stage("packing", 1, 2)

    assert written(act) == ["reading", "packing"]


def on_a_terminal(act: Callable[[Console], None], columns: int = 140) -> str:
    """What a terminal was sent, colours and movements taken out."""
    master, slave = os.openpty()
    sent = bytearray()

    def read() -> None:
        with suppress(OSError):  # how a terminal says that its other end is closed
            while part := os.read(master, 4096):
                sent.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        console = Console(file)
        assert console.terminal.is_terminal
        act(console)
        console.close()
    reader.join(10)
    os.close(master)
    text = sent.decode()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is given back"
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)


def test_the_kernel_of_a_notebook_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as ipykernel sets it, for its commands, too
    event = step(1, steps=1)
    assert written(lambda console: console.show_event(event)) == [format_step_line(event, None)]


def test_a_terminal_shows_bars_of_stages_and_of_the_training() -> None:
    def act(console: Console) -> None:
        console.update_stage("reading", 0, 0)
        console.update_stage("packing", 1_500, 2_000)
        for number in range(1, 4):
            console.show_event(step(number, 4))
        console.show_event(WarningEvent("disk nearly full"))

    shown = on_a_terminal(act)
    assert "1,500/2,000" in shown
    last = [line for line in shown.splitlines() if line.startswith("training")][-1]
    assert "━" in last
    assert "step 3/4  loss 2.3457  lr 3.00e-04  12,346 tokens/s" in last
    assert "warning: disk nearly full" in shown


def test_a_narrow_terminal_still_shows_step_loss_and_speed() -> None:
    shown = on_a_terminal(lambda console: console.show_event(step(123_456, 200_000)), columns=80)
    assert "step 123456/200000  loss 2.3457  lr 3.00e-04  12,346 tokens/s" in shown
