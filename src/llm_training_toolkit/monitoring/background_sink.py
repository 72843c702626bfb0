"""Metric sink in a thread of its own: a server that is slow, down or missing delays no step."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from llm_training_toolkit.monitoring.metrics import ScalarValues

_MAX_PENDING_STEPS = 20_000  # some 40 MB; later ones are lost while the server takes none
_RETRY_SECONDS = 60.0
_CLOSING_RETRY_SECONDS = 1.0
_FAILED_CLOSE_SECONDS = 5.0  # a rank that fails must end soon: others wait for it in a collective
_POLL_SECONDS = 0.2


class Tracker(Protocol):
    """Client of a server that keeps metrics."""

    def log(self, step: int, values: ScalarValues, moment: float) -> None:
        """Send the scalars of a step that ended at `moment`, in seconds since 1970."""

    def finish(self, *, failed: bool) -> None:
        """End the run there."""


class TrackerClient(Protocol):
    """Client library of a tracker: opens it and classifies its errors."""

    name: str

    def open(self) -> Tracker:
        """Import the client and begin or resume the run there."""

    def is_temporary(self, error: Exception) -> bool:
        """Return whether a later try may succeed."""

    def abandon(self) -> None:
        """End what would keep this process alive, after the run has given up the server."""


class BackgroundSink:
    """Sink that sends the scalars of every step to a tracker, in order, from a thread.

    Rows that a server does not take for now are kept and tried again each minute; refused ones are left out.
    `write` raises OSError while the last try has failed, so that `Metrics` reports a failure once, and its end.
    """

    def __init__(self, client: TrackerClient, close_seconds: float, retry_seconds: float = _RETRY_SECONDS) -> None:
        """Start the thread. close_seconds: longest wait of `close`."""
        self.name = client.name
        self._client = client
        self._close_seconds, self._retry_seconds = close_seconds, retry_seconds
        self._pending: queue.Queue[tuple[int, ScalarValues, float]] = queue.Queue(_MAX_PENDING_STEPS)
        self._failure = ""
        self._run_failed = False
        self._closing, self._given_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"sink-{client.name}")
        self._thread.start()

    def write(self, step: int, values: ScalarValues) -> None:
        """Hand over the scalars of a step. Raises OSError if the server cannot be written now."""
        if not self._thread.is_alive():  # the client cannot be opened; its failure is known
            raise OSError(self._failure)
        try:
            self._pending.put_nowait((step, values, time.time()))
        except queue.Full:
            raise OSError(f"{_MAX_PENDING_STEPS:,} steps wait for it, further ones are lost") from None
        if self._failure:
            raise OSError(self._failure)

    def add_text(self, step: int, name: str, content: str) -> None:
        """Ignore texts, which are for TensorBoard."""

    def sync(self) -> None:
        """Do nothing: `metrics.jsonl` holds the same numbers."""

    def close(self, *, failed: bool = False) -> None:
        """Wait until everything is sent, as long as allowed. Raises OSError if it is not.

        failed: the run ended with an error; the wait is then five seconds at most.
        """
        self._run_failed = failed
        self._closing.set()
        seconds = min(self._close_seconds, _FAILED_CLOSE_SECONDS) if failed else self._close_seconds
        self._thread.join(seconds)
        self._given_up.set()
        if self._thread.is_alive():
            self._client.abandon()
            raise OSError(self._failure or f"it did not take everything within {seconds:.0f} s")
        if self._failure:
            raise OSError(self._failure)

    def _work(self) -> None:
        opened: list[Tracker] = []
        if not self._try(lambda: opened.append(self._client.open())):
            return
        [tracker] = opened
        while not (self._closing.is_set() and self._pending.empty()):
            try:
                step, values, moment = self._pending.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            self._try(partial(tracker.log, step, values, moment))
            if self._given_up.is_set():
                return
        self._try(lambda: tracker.finish(failed=self._run_failed))

    def _try(self, action: Callable[[], None]) -> bool:
        """Try until it succeeds; return False if it is refused for good, or if the run has given up."""
        while True:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - clients of servers raise anything, which must not end training
                self._failure = f"{type(error).__name__}: {error}"
                if not self._client.is_temporary(error) or not self._wait():
                    return False
            else:
                self._failure = ""
                return True

    def _wait(self) -> bool:
        """Wait for the next try; return False once the run has given up."""
        if not self._closing.wait(self._retry_seconds):
            return True
        return not self._given_up.wait(min(_CLOSING_RETRY_SECONDS, self._retry_seconds))
