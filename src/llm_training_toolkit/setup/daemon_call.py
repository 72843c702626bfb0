"""Call in a daemon thread, for requests to the hub that a person waits for only so long.

Looking up a name has no timeout of its own, and executors of `concurrent.futures` would hold the exit of the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

# Of a plan, for four requests and the address: a name's look-up takes 10 to 30 s without a network.
PLAN_PATIENCE_SECONDS = 12.0


def start_daemon_call(call: Callable[[], T], name: str) -> Future[T]:
    """Start a call in a thread of this name that ends with the process; return the future of its outcome."""
    future: Future[T] = Future()

    def keep_outcome() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # noqa: BLE001 - edge of the thread: raised again by the future
            future.set_exception(error)

    threading.Thread(target=keep_outcome, daemon=True, name=name).start()
    return future
