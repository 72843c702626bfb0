"""A command of the toolkit in a process of its own, for callers from Python: lines of progress, result or exception."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

from llm_training_toolkit import errors
from llm_training_toolkit.errors import LaunchError, Problem, ToolkitError

ProgressCallback = Callable[[str], object]
_POLL_SECONDS = 0.1
_LAST_LINES = 20  # of the progress, for the error of a process that ended without a word


def run_command(verb: str, arguments: Sequence[str], progress: ProgressCallback) -> dict[str, Any]:
    """Run `ltt VERB … --json` and return its JSON object. Raises the ToolkitError that it ended with.

    On KeyboardInterrupt the command is asked to stop, once for each interrupt, and awaited.
    """
    # -P: a module of the working directory, such as json.py, is not imported in place of Python's own. The session of
    # its own keeps a terminal's Ctrl-C from arriving twice, where the second one stops at once.
    command = [sys.executable, "-P", "-m", "llm_training_toolkit", verb, *arguments, "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", start_new_session=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    readers = [_start_reader(process.stdout, printed), _start_reader(process.stderr, lines)]
    try:
        last = _follow_lines(process, lines, readers[1], progress)
    finally:
        if process.poll() is None:  # `progress` has failed
            process.send_signal(signal.SIGINT)
            process.wait()
    readers[0].join()
    return _read_result(printed, process.returncode, last)


def _follow_lines(
    process: subprocess.Popen[str], lines: queue.SimpleQueue[str], reader: threading.Thread, progress: ProgressCallback
) -> list[str]:
    """Pass every line to `progress` until the process has ended; return the last ones."""
    last = deque[str](maxlen=_LAST_LINES)
    interrupted = False
    while process.poll() is None or reader.is_alive() or not lines.empty():
        try:
            with suppress(queue.Empty):
                line = lines.get(timeout=_POLL_SECONDS)
                last.append(line)
                progress(line)
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return list(last)


def _start_reader(stream: IO[str], lines: queue.SimpleQueue[str]) -> threading.Thread:
    def read_lines() -> None:
        with stream:
            for line in stream:
                lines.put(line.rstrip("\n"))

    thread = threading.Thread(target=read_lines, daemon=True, name="command-output")
    thread.start()
    return thread


def _read_result(printed: queue.SimpleQueue[str], code: int, last: Sequence[str]) -> dict[str, Any]:
    """Return the JSON object of the last printed line. Raises ToolkitError for a failure, or without such a line."""
    text = ""
    while not printed.empty():
        text = printed.get() or text
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise LaunchError("\n".join([f"the command ended with code {code} and without a result", *last]))
    if found.get("status") == "failed":
        raise _build_error(found)
    return found


def _build_error(found: dict[str, Any]) -> ToolkitError:
    """Build the exception that the command ended with, with its class and problems."""
    kind = getattr(errors, found["kind"], ToolkitError)
    problems = tuple(Problem(**problem) for problem in found["problems"])
    error: ToolkitError = kind.from_problems(found["error"], problems)
    return error
