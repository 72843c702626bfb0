"""The line between the driver and its workers: events one way, the wish to stop the other.

The actor's process imports this module while the workers start, so neither torch nor Ray Train comes with it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from llm_training_toolkit.context import Event

_ASK_EVERY = 0.3
"""Seconds between a worker's questions whether to stop: the loop itself never waits for the answer."""

_MOST_HELPED = 20
"""Halvings of a micro-batch that are not counted as failures: more than any micro-batch has."""


@dataclass
class _Group:
    """What is known of the workers that run now."""

    cause: str = ""
    """What the first rank to fail told; the others lose their connection to it."""
    helped: bool = False
    answer: str | None = None


class _Control:
    """State of the line; lives in an actor beside the driver and ends with it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._final = ""
        self._failures = self._helped = 0
        self._group = _Group()

    def post(self, event: Event) -> None:
        """A worker tells something."""
        self._events.append(event)
        if event["kind"] == "started":
            self._group = _Group()
        elif event["kind"] == "error":
            self._group.cause = self._group.cause or f"rank {event['rank']} failed: {event['text']}"
            self._group.helped = self._group.helped or event["helped"]
            if event["final"]:
                self._final = self._final or str(event["text"])

    def verdict(self, allowed: int, seen: str) -> str:
        """The workers have failed: why the run must end now; empty if they may start again.

        `seen` is what Ray saw of the failure. Ray asks again while it waits for ranks to end, so the answer is kept for
        the workers' lifetime. A failure whose remedy is known (less memory is taken next time) is not counted among
        the `allowed` ones.
        """
        if self._final:
            return self._final
        if self._group.answer is None:
            self._group.answer = self._judge(allowed, seen)
        return self._group.answer

    def _judge(self, allowed: int, seen: str) -> str:
        if self._group.helped and self._helped < _MOST_HELPED:
            self._helped += 1
            return ""
        self._failures += 1
        if self._failures <= allowed:
            return ""
        return f"{self._group.cause or seen}. All restarts (failures.max = {allowed}) are used up"

    def last_answer(self) -> str:
        """Why the run ended, if `verdict` said so."""
        return self._group.answer or ""

    def take(self) -> list[Event]:
        """The driver takes what was told since it last asked."""
        taken, self._events = self._events, []
        return taken

    def ask_to_stop(self) -> None:
        """The driver wants the run to stop."""
        self._stop = True

    def stop_requested(self) -> bool:
        """Whether it does."""
        return self._stop


def open_line() -> Any:  # noqa: ANN401 - Ray's actor handles have no types
    """Start the actor on the driver's own node, so that no other node's death takes it; it takes no CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Control).options(num_cpus=0, scheduling_strategy=here).remote()


def reporter(line: Any) -> Callable[[Event], None]:  # noqa: ANN401
    """A worker's way to tell events without waiting."""

    def report(event: Event) -> None:
        line.post.remote(dict(event))

    return report


def stop_watch(line: Any) -> Callable[[], bool]:  # noqa: ANN401
    """A worker's answer to 'shall I stop?', kept fresh by a thread."""
    stop = threading.Event()

    def watch() -> None:
        wait = threading.Event()
        while not stop.is_set():
            try:
                if ray.get(line.stop_requested.remote()):
                    stop.set()
            except ray.exceptions.RayError:
                return  # the driver is gone; Ray ends this worker
            wait.wait(_ASK_EVERY)

    threading.Thread(target=watch, daemon=True, name="stop-watch").start()
    return stop.is_set
