"""RunContext: environment of the training loop (rank, device, collectives, stop requests).

Made by `launch`, for Ray Train, torchrun or a single process; the loop does not distinguish them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from llm_training_toolkit.distributed.events import Event
from llm_training_toolkit.distributed.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch

# torch is imported in the collectives only, because the driver imports this module as well and needs no torch.
T = TypeVar("T")


class StopRequest(enum.IntEnum):
    """Request to stop or drain, from the driver or a signal. Higher values win."""

    NONE = 0
    DRAIN_AFTER_CHECKPOINT = 1
    """End after the next checkpoint that is due; other workers resume from it."""
    DRAIN = 2
    """Save now and end; other workers resume from it."""
    STOP = 3
    """Save now and end."""


@dataclass(frozen=True)
class RunContext:
    """One rank among the ranks of a run; a process group exists if there are several."""

    rank: int
    world_size: int
    device: torch.device
    event_listener: Callable[[Event], None] | None = None
    """Shows events to the user; set on rank 0 only."""
    stop_request_reader: Callable[[], StopRequest] | None = None
    """Returns the current stop request; asked on rank 0 only."""
    rungs: tuple[int, ...] = ()
    """Steps after which a trial of a search is compared with others, and continues or ends."""
    rung_waiter: Callable[[int], StopRequest] | None = None
    """Waits for the decision on a trial after a rung; asked on rank 0 only."""
    metric_exporter: Callable[[Mapping[str, float]], None] | None = None
    """Exports scalars by metric name as gauges; set by Ray, called on rank 0 only."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Current phase of this rank, set by the rank and read by hang detection."""

    @property
    def is_rank_zero(self) -> bool:
        """True on rank 0, the only writer of shared output."""
        return self.rank == 0

    def report(self, event: Event) -> None:
        """Pass an event to the listener, if this rank has one."""
        if self.event_listener is not None:
            self.event_listener(event)

    def read_stop_request(self) -> StopRequest:
        """Return the current stop request, NONE on ranks other than 0: the loop shares it with all."""
        if self.stop_request_reader is None or not self.is_rank_zero:
            return StopRequest.NONE
        return self.stop_request_reader()

    def await_rung(self, step: int) -> StopRequest:
        """Wait on rank 0 for the decision on a trial after a rung; the others get NONE and share it."""
        if self.rung_waiter is None or not self.is_rank_zero:
            return StopRequest.NONE
        return self.rung_waiter(step)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist  # noqa: PLC0415

            dist.barrier()

    def broadcast_object(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist  # noqa: PLC0415

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist  # noqa: PLC0415

        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_object(self, value: T) -> list[T]:
        """Return every rank's value on rank 0, in the order of ranks; the others get an empty list.

        At thousands of ranks the values together are too large for every rank to hold.
        """
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist  # noqa: PLC0415

        values: list[T] | None = [value] * self.world_size if self.is_rank_zero else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Return each value summed over the ranks in double precision, from one all-reduce."""
        if self.world_size == 1:
            return [float(value) for value in values]
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]
