"""The line between the driver and its workers: events one way, the wish to stop the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.train import UserCallback

from llm_training_toolkit.context import Event
from llm_training_toolkit.errors import LaunchError

_ASK_EVERY = 0.3
"""Seconds between a worker's questions whether to stop: the loop itself never waits for the answer."""


class _Control:
    """State of the line; lives in an actor beside the driver and ends with it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._stop = False
        self._final = ""
        self._helped = False
        self._failures = 0

    def post(self, event: Event) -> None:
        """A worker tells something."""
        self._events.append(event)
        if event["kind"] == "error" and event["final"]:
            self._final = self._final or str(event["text"])
        self._helped = self._helped or (event["kind"] == "error" and event["helped"])

    def verdict(self, allowed: int) -> str:
        """The workers have failed: why the run must end now; empty if they may start again.

        A failure whose remedy is known (less memory is taken next time) is not counted among the `allowed` ones.
        """
        if self._final:
            return self._final
        if self._helped:
            self._helped = False
            return ""
        self._failures += 1
        return "" if self._failures <= allowed else f"all restarts (failures.max = {allowed}) are used up"

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


class Restarts(UserCallback):
    """Decides whether Ray may start the workers again: not for an error they would meet again, nor for ever.

    Runs in Ray Train's controller, where an exception from a callback ends the run without a retry.
    Shutting Ray down under a running `fit` would end it too, but now and then with a segmentation fault.
    """

    def __init__(self, line: Any, allowed: int) -> None:  # noqa: ANN401
        self._line, self._allowed = line, allowed

    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:  # noqa: ANN401, ARG002
        """Raise LaunchError when the run must end."""
        if text := ray.get(self._line.verdict.remote(self._allowed)):
            raise LaunchError(text)


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
