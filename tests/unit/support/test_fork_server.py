"""A forked command is the one that subprocess would have started: arguments, environment, streams, signals, end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fork_server

pytestmark = pytest.mark.slow  # the server imports for seconds
TELL = """
import json, os, sys
print(json.dumps({
    "arguments": sys.argv, "folder": os.getcwd(), "asked": os.environ.get("ASKED"), "typed": sys.stdin.read(),
    "path": sys.path[0], "group": os.getpgrp(), "threads": len(os.listdir("/proc/self/task")),
}))
print("on the other stream", file=sys.stderr)
sys.exit(7)
"""
WAIT = "import sys, time\nprint('here', flush=True)\ntime.sleep(60)"


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_a_command_finds_and_how_it_ends(tmp_path: Path) -> None:
    asked = [sys.executable, "-c", TELL, "one", "-two"]
    options: dict[str, Any] = {
        "capture_output": True,
        "input": "words",
        "cwd": tmp_path,
        "env": {**os.environ, "ASKED": "yes"},
    }
    forked = fork_server.run(asked, **options)
    started = subprocess.run(asked, text=True, check=False, **options)
    assert forked.returncode == started.returncode == 7
    assert forked.stderr == started.stderr == "on the other stream\n"
    assert told(forked) == told(started)
    with pytest.raises(subprocess.CalledProcessError):
        fork_server.run(asked, check=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it_and_its_end_is_told(number: signal.Signals) -> None:
    with fork_server.popen([sys.executable, "-c", WAIT], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=600)
    assert process.returncode == process.poll()
    if number is signal.SIGINT:
        assert process.returncode != 0
        assert "KeyboardInterrupt" in err
    else:
        assert process.returncode == -number
    assert not Path(f"/proc/{process.pid}").exists()


def test_a_module_and_the_installed_command_have_their_own_names() -> None:
    shown = fork_server.run([sys.executable, "-m", "llm_training_toolkit", "--help"], capture_output=True)
    installed = fork_server.run([str(Path(sys.executable).parent / "ltt"), "--help"], capture_output=True)
    assert shown.returncode == installed.returncode == 0
    assert shown.stdout.startswith(("Usage: ltt", "Usage: python -m"))
    assert installed.stdout.startswith("Usage: ltt")
