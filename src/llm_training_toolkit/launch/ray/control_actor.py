"""Control channel between driver and workers (one Ray actor): events and heartbeats up, stop requests down.

The actor's process imports this module while the workers start, so torch and Ray Train stay out of it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray

from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import Event, RungEvent
from llm_training_toolkit.distributed.heartbeat import Heartbeat, HeartbeatSnapshot

_RANK0_HEARTBEAT_SECONDS = 0.3  # replies carry the stop request, so that the training loop never waits for one
_RUNG_POLL_SECONDS = 0.05
OTHER_RANKS_HEARTBEAT_SECONDS = 2.0
_REPORT_ATTEMPTS = 5  # one second apart
HeartbeatsByRank = dict[int, tuple[HeartbeatSnapshot, float]]  # newest heartbeat, and its age in seconds


class HeartbeatReply(NamedTuple):
    """Reply to a heartbeat."""

    stop_request: StopRequest
    is_hung: bool
    """The run hangs: the rank writes down its collectives, and is killed in a moment."""


class _ControlActor:
    """Control channel of one worker group: an actor on the driver's node that ends with the driver."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._heartbeats: dict[int, tuple[HeartbeatSnapshot, float]] = {}
        self._stop_request = StopRequest.NONE
        self._is_hung = False
        self._rung_decisions: dict[int, StopRequest] = {}

    def send_event(self, event: Event) -> None:
        """Queue a worker's event."""
        self._events.append(event)

    def receive_heartbeat(self, rank: int, snapshot: HeartbeatSnapshot) -> HeartbeatReply:
        """Store a rank's heartbeat; return the driver's current requests."""
        self._heartbeats[rank] = (snapshot, time.monotonic())
        return HeartbeatReply(self._stop_request, self._is_hung)

    def report_hang(self) -> None:
        """Have every rank that sends heartbeats write its flight record."""
        self._is_hung = True

    def drain_events(self) -> tuple[list[Event], HeartbeatsByRank]:
        """Return the events since the last call, and each rank's newest heartbeat."""
        events, self._events = self._events, []
        now = time.monotonic()
        return events, {rank: (snapshot, now - came) for rank, (snapshot, came) in self._heartbeats.items()}

    def request_stop(self, stop_request: StopRequest) -> None:
        """Store the driver's stop request; a weaker one does not replace a stronger one."""
        self._stop_request = max(self._stop_request, stop_request)

    def cancel_drain(self) -> None:
        """Withdraw DRAIN_AFTER_CHECKPOINT, but no stronger request."""
        if self._stop_request is StopRequest.DRAIN_AFTER_CHECKPOINT:
            self._stop_request = StopRequest.NONE

    def resolve_rung(self, step: int, stop_request: StopRequest) -> None:
        """Store the driver's decision on a trial after a rung."""
        self._rung_decisions[step] = stop_request

    def get_rung_decision(self, step: int) -> StopRequest | None:
        """Return the driver's decision on a rung, None if pending."""
        return self._rung_decisions.get(step)


def start_control_actor() -> Any:  # noqa: ANN401 - Ray's actor handles have no types
    """Start the actor on the driver's node, so that it survives the loss of any other; it reserves no CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_ControlActor).options(num_cpus=0, scheduling_strategy=here).remote()


def build_reporter(control: Any) -> Callable[[Event], None]:  # noqa: ANN401
    """Return a function that sends events without waiting."""

    def report_event(event: Event) -> None:
        control.send_event.remote(event)

    return report_event


def report_with_retry(control: Any, event: Event) -> None:  # noqa: ANN401
    """Send an event that must arrive, with retries after transient connection errors. Never raises a Ray error."""
    for attempt in range(_REPORT_ATTEMPTS):
        time.sleep(min(attempt, 1))
        try:
            ray.get(control.send_event.remote(event))
        except ray.exceptions.ActorDiedError:
            return  # the driver is gone
        except ray.exceptions.RayError:
            continue
        return


def build_rung_waiter(control: Any) -> Callable[[int], StopRequest]:  # noqa: ANN401
    """Return rank 0's function that blocks until the driver decides on a trial at a rung."""

    def await_rung(step: int) -> StopRequest:
        control.send_event.remote(RungEvent(step))
        while (stop_request := ray.get(control.get_rung_decision.remote(step))) is None:
            time.sleep(_RUNG_POLL_SECONDS)
        return StopRequest(stop_request)

    return await_rung


def start_heartbeat(
    control: Any,  # noqa: ANN401
    rank: int,
    heartbeat: Heartbeat,
    on_hang: Callable[[], None],
) -> Callable[[], StopRequest]:
    """Send heartbeats from a thread; return a function that reads the stop request in the newest reply.

    The thread calls `on_hang` once if the driver finds that the run hangs.
    """
    newest_request = [StopRequest.NONE]
    every = OTHER_RANKS_HEARTBEAT_SECONDS if rank else _RANK0_HEARTBEAT_SECONDS

    def send_heartbeats() -> None:
        wait, is_hung = threading.Event(), False
        while True:
            try:
                reply: HeartbeatReply = ray.get(control.receive_heartbeat.remote(rank, heartbeat.get_snapshot()))
                newest_request[0] = reply.stop_request
                if reply.is_hung and not is_hung:
                    is_hung = True
                    on_hang()
            except ray.exceptions.ActorDiedError:
                return  # the driver is gone; Ray kills this worker
            except ray.exceptions.RayError:
                pass  # transient connection error; a rank without heartbeats would be killed as hung
            wait.wait(every)

    threading.Thread(target=send_heartbeats, daemon=True, name="heartbeat").start()
    return lambda: newest_request[0]
