"""Stop signals (Ctrl-C, SIGTERM, SIGHUP) as stop requests: the run stops after the current step, with a checkpoint.

Handlers set flags and queue the signal; threads print and call Ray. A handler that prints may interrupt a print.
"""

from __future__ import annotations

import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPT_PAUSE_SECONDS = 1.0  # a storm of signals interrupts once, so that the clean-up of the first is not cut short


class _Interrupter:
    """Handler that raises KeyboardInterrupt, at most once a second."""

    def __init__(self) -> None:
        self._last = float("-inf")

    def interrupt(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Raise KeyboardInterrupt, unless the previous one is still being handled."""
        now = time.monotonic()
        if now - self._last > _INTERRUPT_PAUSE_SECONDS:
            self._last = now
            raise KeyboardInterrupt


@contextmanager
def interrupt_on_stop_signals() -> Iterator[None]:
    """Turn stop signals into KeyboardInterrupt, until the command is over; ignore them afterwards.

    Python resets handlers while it exits, so a late signal would replace the command's exit code. Ignored hang-ups
    (nohup) stay ignored. Main thread only.
    """
    interrupter = _Interrupter()
    for number in _find_stop_signals():
        signal.signal(number, interrupter.interrupt)
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` once, from a thread, after the first stop signal; a SIGINT after it interrupts at once.

    After a requested stop, SIGTERM and SIGHUP stay ignored: the command is about to end. Main thread only.
    """
    received: queue.SimpleQueue[int] = queue.SimpleQueue()  # its `put` may interrupt itself
    interrupter, asked = _Interrupter(), False

    def handle_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            received.put(number)
        elif number == signal.SIGINT:
            interrupter.interrupt()

    def wait_for_signal() -> None:
        if received.get():
            ask()

    threading.Thread(target=wait_for_signal, daemon=True, name="stop-signals").start()
    before = {number: signal.signal(number, handle_signal) for number in _find_stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if asked and number != signal.SIGINT else handler)
        received.put(0)  # ends the thread


def _find_stop_signals() -> list[signal.Signals]:
    """Return the stop signals without a hang-up that is ignored, as `nohup` and `disown` ask for."""
    return [each for each in _STOP_SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


@contextmanager
def start_processes_in_own_session() -> Iterator[list[int]]:
    """Start every child process of this block in a session of its own; yield a list that gets the session ids.

    Signals to the command's process group or terminal then reach the command alone. `timeout`, systemd and a closed
    terminal send such signals; Ray has no option for it.
    """
    plain = subprocess.Popen.__init__
    sessions: list[int] = []

    def start_process(self: subprocess.Popen[Any], *args: Any, **options: Any) -> None:  # noqa: ANN401 - as in Popen
        plain(self, *args, **options | {"start_new_session": True})
        sessions.append(self.pid)

    subprocess.Popen.__init__ = start_process  # type: ignore[method-assign]
    try:
        yield sessions
    finally:
        subprocess.Popen.__init__ = plain  # type: ignore[method-assign]


@contextmanager
def kill_sessions_after_death(sessions: Sequence[int]) -> Iterator[None]:
    """Kill the process groups of these sessions if this process dies in this block, also by SIGKILL.

    Ray's servers end with their parent, but the agents of its raylet outlive them. A shell waits for the death, because
    it starts at once.
    """
    if not sessions:
        yield
        return
    script = 'read -r _; for group do kill -s KILL -- "-$group"; done'
    reaper = subprocess.Popen(
        ["sh", "-c", script, "ray-reaper", *map(str, sessions)],
        stdin=subprocess.PIPE,  # ends with this process, which never writes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        reaper.kill()
        reaper.communicate()
