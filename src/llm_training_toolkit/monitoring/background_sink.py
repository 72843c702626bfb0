"""Metric sink in a thread of its own: a server that is slow, down or not installed delays no step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from llm_training_toolkit.monitoring.metrics import MetricSink, ScalarValues

_MAX_PENDING_STEPS = 20_000  # some 40 MB; later ones are lost while the server takes none
_RETRY_SECONDS = 60.0
_CLOSE_SECONDS = 30.0  # until a run that ends gives up a server that takes nothing


class BackgroundSink:
    """Sink that opens another one in a thread and passes everything on in order.

    What a server refuses is tried again each minute, and kept meanwhile. `write` raises OSError as long as the last
    try failed, so that `Metrics` reports the failure once and the recovery too.
    """

    def __init__(self, name: str, open_sink: Callable[[], MetricSink], retry_seconds: float = _RETRY_SECONDS) -> None:
        """Start the thread, which calls `open_sink`."""
        self.name = name
        self._open_sink, self._retry_seconds = open_sink, retry_seconds
        self._pending: queue.Queue[Callable[[MetricSink], None] | None] = queue.Queue(_MAX_PENDING_STEPS)
        self._failure = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"sink-{name}")
        self._thread.start()

    def write(self, step: int, values: ScalarValues) -> None:
        """Hand over the scalars of a step. Raises OSError if the sink cannot be written now."""
        self._put(lambda sink: sink.write(step, values))

    def add_text(self, step: int, name: str, content: str) -> None:
        """Hand over a text."""
        self._put(lambda sink: sink.add_text(step, name, content))

    def sync(self) -> None:
        """Do nothing: `metrics.jsonl` holds the same numbers."""

    def close(self) -> None:
        """Wait until everything is written, half a minute at most. Raises OSError if it is not."""
        self._closing.set()
        with suppress(queue.Full):  # the thread then ends at its next failure
            self._pending.put_nowait(None)
        self._thread.join(_CLOSE_SECONDS)
        if self._failure or self._thread.is_alive():
            raise OSError(self._failure or f"it did not take everything within {_CLOSE_SECONDS:.0f} s")

    def _put(self, task: Callable[[MetricSink], None]) -> None:
        try:
            self._pending.put_nowait(task)
        except queue.Full:
            raise OSError(f"{_MAX_PENDING_STEPS:,} steps wait for it, further ones are lost") from None
        if self._failure:
            raise OSError(self._failure)

    def _run(self) -> None:
        if not self._retry(self._open):
            return
        while (task := self._pending.get()) is not None:
            if not self._retry(partial(task, self._sink)):
                return
        self._retry(self._sink.close)

    def _open(self) -> None:
        self._sink = self._open_sink()

    def _retry(self, action: Callable[[], None]) -> bool:
        """Try until it succeeds; return False if the run ends before, or if the client is not installed."""
        while True:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - clients of servers raise anything, which must not end training
                self._failure = f"{type(error).__name__}: {error}"
                if isinstance(error, ImportError) or self._closing.wait(self._retry_seconds):
                    return False
            else:
                self._failure = ""
                return True
