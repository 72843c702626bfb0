"""Ctrl-C and SIGTERM as stop requests: the run stops after the current step, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def on_stop_signal(ask: Callable[[], None]) -> Iterator[None]:
    """Call `ask` at SIGINT or SIGTERM; a SIGINT after the first signal interrupts at once. Main thread only."""
    asked = 0

    def handle_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        ask()

    before = {number: signal.signal(number, handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
