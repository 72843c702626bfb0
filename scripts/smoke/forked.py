"""Processes of a rehearsal on CPU, forked from one that has imported torch and DeepSpeed, which takes seconds.

Tasks on a GPU are started anew: a process that has touched one cannot be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_LOCK = threading.Lock()
_STARTED = threading.Event()


class ForkedProcess:
    """`python -m MODULE ARGUMENTS` in a session of its own, with the methods of `subprocess.Popen` that are needed."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        with _LOCK:
            _start_server(environment)
            self._process = _FORKS.Process(target=_become, args=(module, arguments, log, dict(environment)))
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Exit code, None while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self) -> int | None:
        """Wait for the end."""
        self._process.join()
        return self._process.exitcode


def _start_server(environment: Mapping[str, str]) -> None:
    """Start the process to fork from, once. It takes over this one's environment, which changes for that moment alone.

    The first task runs by itself, so that no other thread reads the environment then.
    """
    if _STARTED.is_set():
        return
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        forkserver.set_forkserver_preload(["smoke.preload"])
        forkserver.ensure_running()
        _STARTED.set()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _become(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Make this process what the command would have started."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
