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

    def post(self, event: Event) -> None:
        """A worker tells something."""
        self._events.append(event)
        if event["kind"] == "error" and event["final"]:
            self._final = self._final or str(event["text"])

    def final_error(self) -> str:
        """What a worker met that a restart would meet again; empty if nothing."""
        return self._final

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


class EndOnFinalError(UserCallback):
    """Keeps Ray from restarting workers that would meet the same error again.

    Runs in Ray Train's controller, where an exception from a callback ends the run without a retry.
    Shutting Ray down under a running `fit` would end it too, but now and then with a segmentation fault.
    """

    def __init__(self, line: Any) -> None:  # noqa: ANN401
        self._line = line

    def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:  # noqa: ANN401, ARG002
        """Raise LaunchError when a worker reported an error of ours."""
        if text := ray.get(self._line.final_error.remote()):
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
