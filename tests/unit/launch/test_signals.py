"""Stop signals ask once, whatever they interrupt; a storm of them still ends in the command's own exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

_COMMAND = """
import os, signal, sys, time
from llm_training_toolkit.launch.signals import interrupt_on_stop_signals, on_stop_signal
asked = []
with interrupt_on_stop_signals():
    try:
        with on_stop_signal(lambda: asked.append(1)):
            print("ready", flush=True)
            while not asked:
                print("x" * 2000)
            time.sleep(0.2)
    except KeyboardInterrupt:
        sys.exit(76)
sys.exit(75 if asked == [1] else 1)
"""
_BEFORE_TRAINING = """
import sys, time
from llm_training_toolkit.launch.signals import interrupt_on_stop_signals
with interrupt_on_stop_signals():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.5)
sys.exit(75)
"""
_SESSION = """
import os, subprocess, sys
from llm_training_toolkit.launch.signals import start_processes_in_own_session
ask = [sys.executable, "-c", "import os; print(os.getsid(0))"]
with start_processes_in_own_session():
    away = subprocess.run(ask, capture_output=True, text=True).stdout
here = subprocess.run(ask, capture_output=True, text=True).stdout
sys.exit(0 if int(here) == os.getsid(0) != int(away) else 1)
"""


def start(code: str, *before: str) -> subprocess.Popen[bytes]:
    """A command that has said that it is ready."""
    process = subprocess.Popen([*before, sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def drain_and_wait(process: subprocess.Popen[bytes]) -> int:
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_print_asks_once_for_a_stop(number: signal.Signals) -> None:
    with start(_COMMAND, "env", "--default-signal=HUP") as process:
        process.send_signal(number)
        assert drain_and_wait(process) == 75


@pytest.mark.parametrize("code", [_COMMAND, _BEFORE_TRAINING], ids=["training", "before"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_hundred_signals_end_in_75(code: str, number: signal.Signals) -> None:
    with start(code, "env", "--default-signal=HUP") as process:
        for _ in range(200):
            process.send_signal(number)
            time.sleep(0.002)
        assert drain_and_wait(process) == 75


_ENDLESS = _COMMAND.replace("while not asked", "while True")


def test_a_second_interrupt_leaves_at_once() -> None:
    with start(_ENDLESS) as process:
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert drain_and_wait(process) == 76


def test_a_hang_up_that_the_shell_ignores_stays_ignored() -> None:
    with start(_BEFORE_TRAINING, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert drain_and_wait(process) == 75


def test_processes_in_a_session_of_their_own_and_later_ones_in_the_commands(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", _SESSION], cwd=tmp_path, check=False).returncode == 0


_REAPED = """
import subprocess, time
from llm_training_toolkit.launch.signals import kill_sessions_after_death, start_processes_in_own_session
with start_processes_in_own_session() as sessions:
    away = subprocess.Popen(["sleep", "60"])
assert sessions == [away.pid]
with kill_sessions_after_death(sessions):
    pass
print("ready", flush=True)
assert away.poll() is None, "an orderly end kills nothing"
with kill_sessions_after_death(sessions):
    print(away.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_command_takes_its_sessions_along() -> None:
    with start(_REAPED) as process:
        assert process.stdout is not None
        away = psutil.Process(int(process.stdout.readline()))
        process.kill()
    assert psutil.wait_procs([away], timeout=10)[1] == []
