"""The line between the driver and its workers: events and heartbeats one way, what is wanted of the run the other.

The actor's process imports this module while the workers start, so neither torch nor Ray Train comes with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from llm_training_toolkit.distributed.context import Event, StopRequest
from llm_training_toolkit.distributed.heartbeat import Heartbeat, HeartbeatSnapshot

_RANK0_HEARTBEAT_SECONDS = 0.3
"""Seconds between two beats of rank 0, which ask what is wanted: the loop itself never waits for the answer."""
_RUNG_POLL_SECONDS = 0.05
"""Seconds between two looks for the answer at a rung."""
OTHER_RANKS_HEARTBEAT_SECONDS = 2.0
"""Seconds between two beats of every other rank."""
_REPORT_ATTEMPTS = 5
"""How often a worker tells what the driver must know, a second between two tries."""
HeartbeatsByRank = dict[int, tuple[HeartbeatSnapshot, float]]
"""Each rank's newest beat, and seconds since it came."""


class _ControlActor:
    """State of the line to one group of workers; lives in an actor beside the driver and ends with it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._beats: dict[int, tuple[HeartbeatSnapshot, float]] = {}
        self._stop_request = StopRequest.NONE
        self._rung_decisions: dict[int, StopRequest] = {}

    def send_event(self, event: Event) -> None:
        """A worker tells something."""
        self._events.append(event)

    def receive_heartbeat(self, rank: int, beat: HeartbeatSnapshot) -> StopRequest:
        """A worker says where it stands; what is wanted of the run comes back."""
        self._beats[rank] = (beat, time.monotonic())
        return self._stop_request

    def drain_events(self) -> tuple[list[Event], HeartbeatsByRank]:
        """The driver takes what was told since it last asked, and where each rank stands."""
        taken, self._events = self._events, []
        now = time.monotonic()
        return taken, {rank: (beat, now - came) for rank, (beat, came) in self._beats.items()}

    def request_stop(self, wish: StopRequest) -> None:
        """The driver wants something of the run; a stronger wish is not taken back by a weaker one."""
        self._stop_request = max(self._stop_request, wish)

    def cancel_drain(self) -> None:
        """The driver takes back that the ranks leave after their next checkpoint, and nothing stronger."""
        if self._stop_request is StopRequest.DRAIN_AFTER_CHECKPOINT:
            self._stop_request = StopRequest.NONE

    def resolve_rung(self, step: int, wish: StopRequest) -> None:
        """The driver says whether a trial goes on after a rung."""
        self._rung_decisions[step] = wish

    def get_rung_decision(self, step: int) -> StopRequest | None:
        """What the driver said of a rung; None = nothing yet."""
        return self._rung_decisions.get(step)


def start_control_actor() -> Any:  # noqa: ANN401 - Ray's actor handles have no types
    """Start the actor on the driver's own node, so that no other node's death takes it; it takes no CPU."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_ControlActor).options(num_cpus=0, scheduling_strategy=here).remote()


def build_reporter(line: Any) -> Callable[[Event], None]:  # noqa: ANN401
    """A worker's way to tell events without waiting."""

    def report_event(event: Event) -> None:
        line.send_event.remote(dict(event))

    return report_event


def report_with_retry(line: Any, event: Event) -> None:  # noqa: ANN401
    """Tell what the driver must know: again where the connection fails for a moment. Never raises an error of Ray."""
    for attempt in range(_REPORT_ATTEMPTS):
        time.sleep(min(attempt, 1))
        try:
            ray.get(line.send_event.remote(dict(event)))
        except ray.exceptions.ActorDiedError:
            return  # nobody is left to be told
        except ray.exceptions.RayError:
            continue
        return


def build_rung_waiter(line: Any) -> Callable[[int], StopRequest]:  # noqa: ANN401
    """Rank 0's way to ask whether a trial goes on after a rung, which waits for the answer."""

    def await_rung(step: int) -> StopRequest:
        line.send_event.remote({"kind": "rung", "step": step})
        while (wish := ray.get(line.get_rung_decision.remote(step))) is None:
            time.sleep(_RUNG_POLL_SECONDS)
        return StopRequest(wish)

    return await_rung


def start_heartbeat(line: Any, rank: int, pulse: Heartbeat) -> Callable[[], StopRequest]:  # noqa: ANN401
    """Send the pulse from a thread; a worker's answer to 'what is wanted?' comes back, as fresh as the last beat."""
    wanted = [StopRequest.NONE]
    every = OTHER_RANKS_HEARTBEAT_SECONDS if rank else _RANK0_HEARTBEAT_SECONDS

    def send_heartbeats() -> None:
        wait = threading.Event()
        while True:
            try:
                wanted[0] = ray.get(line.receive_heartbeat.remote(rank, pulse.get_snapshot()))
            except ray.exceptions.ActorDiedError:
                return  # the driver is gone; Ray ends this worker
            except ray.exceptions.RayError:
                pass  # a connection that failed for a moment: a rank without heartbeats would be ended as hung
            wait.wait(every)

    threading.Thread(target=send_heartbeats, daemon=True, name="heartbeat").start()
    return lambda: wanted[0]
