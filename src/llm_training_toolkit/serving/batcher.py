"""Queue of requests and the thread that generates for them.

Requests wait in the order of their arrival. When the thread is free it takes the oldest one and the next ones that fit
beside it into one batch. Requests that arrive later wait for the end of that batch.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from llm_training_toolkit.generation.batch import BatchRow, FinishReason, generate_batch, select_batch
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.serving.api_error import ApiError
from llm_training_toolkit.serving.settings import ServingLimits

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResponseEnd:
    """End of an answer; `failed`: the model raised an error."""

    reason: FinishReason | Literal["failed"]
    new_tokens: int


class ResponseStream:
    """One request's answer on its way from the generating thread to the event loop that waits for it.

    Made in the event loop. `timeout`: seconds from the arrival of the request to its last token. `deadline`: their end,
    in the loop's time.
    """

    def __init__(self, timeout: float, deadline: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[str | ResponseEnd] = asyncio.Queue()
        self._timeout, self._deadline = timeout, deadline
        self._cancelled = threading.Event()
        self._started = False
        self.end: ResponseEnd | None = None
        """End of the answer, once `iter_pieces` is exhausted."""

    def on_text(self, piece: str) -> None:
        """Pass on a piece of text, from the generating thread."""
        self._send(piece)

    def on_finish(self, reason: FinishReason, new_tokens: int) -> None:
        """Pass on the end, from the generating thread."""
        _LOGGER.info("answer of %d tokens, end: %s", new_tokens, reason)
        self._send(ResponseEnd(reason, new_tokens))

    def on_start(self) -> None:
        """Note that generation begins, from the generating thread."""
        self._started = True

    def on_failure(self) -> None:
        """Pass on that the model raised an error, from the generating thread."""
        self._send(ResponseEnd("failed", 0))

    def is_cancelled(self) -> bool:
        """Return whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the answer with its next token: the client has left, or time is up."""
        self._cancelled.set()

    def _send(self, event: str | ResponseEnd) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server ends, and its clients are gone
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def iter_pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of text. Raises ApiError: 503 without a start in time, 504 without an end, 500."""
        try:
            while True:
                try:
                    async with asyncio.timeout_at(self._deadline):
                        event = await self._events.get()
                except TimeoutError:
                    raise self._build_timeout_error() from None
                if isinstance(event, str):
                    yield event
                    continue
                self.end = event
                if event.reason == "failed":
                    raise ApiError(500, "generation_failed", "the model failed; the server's log has the reason")
                if event.reason == "cancelled":
                    raise ApiError(503, "server_stopping", "the server is being stopped")
                return
        finally:
            self.cancel()

    def _build_timeout_error(self) -> ApiError:
        limit = f"the server's limit of {self._timeout:g} s"
        if not self._started:
            return ApiError(503, "queue_timeout", f"the request waited in the queue for {limit}; ask again later")
        return ApiError(504, "generation_timeout", f"the answer takes longer than {limit}; ask for fewer tokens")


class QueuedRow(BatchRow):
    """Row whose listener is the stream of a request."""

    listener: ResponseStream


class Batcher:
    """Queue with its thread; `close` ends both."""

    def __init__(self, generator: TextGenerator, limits: ServingLimits) -> None:
        self._generator, self._limits = generator, limits
        self._waiting: list[QueuedRow] = []
        self._running: list[QueuedRow] = []
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="generate")
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are still worked on."""
        return self._thread.is_alive()

    def count_requests(self) -> dict[str, int]:
        """Return how many requests are generated for, and how many wait, without those whose clients have left."""
        with self._change:
            self._drop_cancelled()
            running = sum(not row.listener.is_cancelled() for row in self._running)
            return {"running": running, "waiting": len(self._waiting)}

    def check_room(self) -> None:
        """Raise ApiError 429 if the queue is full."""
        with self._change:
            self._drop_cancelled()
            if len(self._waiting) >= self._limits.max_queued:
                raise ApiError(
                    429, "queue_full", f"{len(self._waiting)} requests wait already, the most allowed; ask again later"
                )

    def submit(self, row: QueuedRow) -> None:
        """Append a request to the queue. Raises ApiError 429 if it is full."""
        with self._change:
            self.check_room()
            if self._closed:
                row.listener.on_finish("cancelled", 0)
            self._waiting.append(row)
            self._change.notify()

    def close(self) -> None:
        """Cancel all requests, and end the thread after the token that it works on."""
        with self._change:
            self._closed = True
            for row in self._waiting:
                row.listener.on_finish("cancelled", 0)
            for row in self._running:
                row.listener.cancel()
            self._change.notify()
        self._thread.join()

    def _work(self) -> None:
        while rows := self._take_batch():
            for row in rows:
                row.listener.on_start()
            try:
                generate_batch(self._generator, rows)
            except Exception:  # the edge of the thread: each request needs an answer, the next batch its turn
                _LOGGER.exception("generation failed for %d requests", len(rows))
                for row in rows:
                    row.listener.on_failure()

    def _take_batch(self) -> list[QueuedRow]:
        """Wait for requests and take some out of the queue; none once the batcher is closed."""
        with self._change:
            self._running = []
            while True:
                self._drop_cancelled()
                if self._waiting or self._closed:
                    break
                self._change.wait()
            if self._closed:
                return []
            context, size = self._generator.context_length, self._limits.batch_size
            self._running = select_batch(self._waiting, context, size)
            self._waiting = [row for row in self._waiting if row not in self._running]
            return self._running

    def _drop_cancelled(self) -> None:
        self._waiting = [row for row in self._waiting if not row.listener.is_cancelled()]
