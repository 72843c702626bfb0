"""The line between driver and workers outlives a connection that fails for a moment."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from launching import Environment
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import Event, NoteEvent
from llm_training_toolkit.distributed.heartbeat import Heartbeat
from llm_training_toolkit.launch.ray.control_actor import HeartbeatReply, report_with_retry, start_heartbeat


def until(true: Callable[[], bool]) -> None:
    """Wait for something, ten seconds at most."""
    end = time.monotonic() + 10
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


class Unsteady:
    """A line whose first two answers of each kind are errors."""

    def __init__(self) -> None:
        self.beats, self.posts = 0, 0

    def receive_heartbeat(self, _rank: int, _beat: Any) -> HeartbeatReply:
        self.beats += 1
        if self.beats < 3:
            raise ConnectionError("for a moment")
        return HeartbeatReply(StopRequest.STOP, is_hung=True)

    def send_event(self, _event: Event) -> None:
        self.posts += 1
        if self.posts < 3:
            raise ConnectionError("for a moment")

    def counted(self) -> int:
        return self.posts


def test_heartbeats_and_reports_continue_after_an_error_and_end_with_the_driver(
    ray_environment: Environment,
) -> None:
    import ray

    ray.init(address=ray_environment["RAY_ADDRESS"], log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor's process does not find the tests
    try:
        line: Any = ray.remote(Unsteady).options(num_cpus=0).remote()
        hangs: list[bool] = []
        stop_request = start_heartbeat(line, 0, Heartbeat(), lambda: hangs.append(True))
        until(lambda: stop_request() is StopRequest.STOP)
        report_with_retry(line, NoteEvent("told"))
        assert ray.get(line.counted.remote()) == 3
        ray.kill(line)
        report_with_retry(line, NoteEvent("told"))
        until(lambda: not any(thread.name == "heartbeat" for thread in threading.enumerate()))
        assert hangs == [True], "once, however many replies say so"
    finally:
        ray.shutdown()
