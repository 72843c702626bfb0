"""The line between the driver and its workers: events and heartbeats one way, what is wanted of the run the other.

The actor's process imports this module while the workers start, so neither torch nor Ray Train comes with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from llm_training_toolkit.distributed.context import Event, Wish
from llm_training_toolkit.distributed.heartbeat import Beat, Pulse

_FIRST_BEATS_EVERY = 0.3
"""Seconds between two beats of rank 0, which ask what is wanted: the loop itself never waits for the answer."""
_ANSWER_EVERY = 0.05
"""Seconds between two looks for the answer at a rung."""
OTHERS_BEAT_EVERY = 2.0
"""Seconds between two beats of every other rank."""
_TRIES = 5
"""How often a worker tells what the driver must know, a second between two tries."""
Heard = dict[int, tuple[Beat, float]]
"""Each rank's newest beat, and seconds since it came."""


class _Control:
    """State of the line to one group of workers; lives in an actor beside the driver and ends with it."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._wish = Wish.GO_ON
        self._answers: dict[int, Wish] = {}

    def post(self, event: Event) -> None:
        """A worker tells something."""
        self._events.append(event)

    def beat(self, rank: int, beat: Beat) -> Wish:
        """A worker says where it stands; what is wanted of the run comes back."""
        self._beats[rank] = (beat, time.monotonic())
        return self._wish

    def take(self) -> tuple[list[Event], Heard]:
        """The driver takes what was told since it last asked, and where each rank stands."""
        taken, self._events = self._events, []
        now = time.monotonic()
        return taken, {rank: (beat, now - came) for rank, (beat, came) in self._beats.items()}

    def want(self, wish: Wish) -> None:
        """The driver wants something of the run; a stronger wish is not taken back by a weaker one."""
        self._wish = max(self._wish, wish)

    def stay(self) -> None:
        """The driver takes back that the ranks leave after their next checkpoint, and nothing stronger."""
        if self._wish is Wish.LEAVE_WHEN_SAVED:
            self._wish = Wish.GO_ON

    def answer(self, step: int, wish: Wish) -> None:
        """The driver says whether a trial goes on after a rung."""
        self._answers[step] = wish

    def answered(self, step: int) -> Wish | None:
        """What the driver said of a rung; None = nothing yet."""
        return self._answers.get(step)


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


def tell(line: Any, event: Event) -> None:  # noqa: ANN401
    """Tell what the driver must know: again where the connection fails for a moment. Never raises an error of Ray."""
    for attempt in range(_TRIES):
        time.sleep(min(attempt, 1))
        try:
            ray.get(line.post.remote(dict(event)))
        except ray.exceptions.ActorDiedError:
            return  # nobody is left to be told
        except ray.exceptions.RayError:
            continue
        return


def asker(line: Any) -> Callable[[int], Wish]:  # noqa: ANN401
    """Rank 0's way to ask whether a trial goes on after a rung, which waits for the answer."""

    def ask(step: int) -> Wish:
        line.post.remote({"kind": "rung", "step": step})
        while (wish := ray.get(line.answered.remote(step))) is None:
            time.sleep(_ANSWER_EVERY)
        return Wish(wish)

    return ask


def heartbeat(line: Any, rank: int, pulse: Pulse) -> Callable[[], Wish]:  # noqa: ANN401
    """Send the pulse from a thread; a worker's answer to 'what is wanted?' comes back, as fresh as the last beat."""
    wanted = [Wish.GO_ON]
    every = OTHERS_BEAT_EVERY if rank else _FIRST_BEATS_EVERY

    def beat() -> None:
        wait = threading.Event()
        while True:
            try:
                wanted[0] = ray.get(line.beat.remote(rank, pulse.read()))
            except ray.exceptions.ActorDiedError:
                return  # the driver is gone; Ray ends this worker
            except ray.exceptions.RayError:
                pass  # a connection that failed for a moment: a rank without heartbeats would be ended as hung
            wait.wait(every)

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    return lambda: wanted[0]
