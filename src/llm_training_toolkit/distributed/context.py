"""RunContext: all that the training loop knows of the world it runs in.

The loop asks for its rank, its device and a few agreements between ranks; whether Ray Train,
torchrun or a single process stands behind them is settled by `launch`, which makes the context.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from llm_training_toolkit.distributed.heartbeat import Heartbeat

if TYPE_CHECKING:
    import torch

# torch.distributed is imported where several ranks talk: the driver, which reads this module too, needs no torch.
T = TypeVar("T")
Event = Mapping[str, Any]


class StopRequest(enum.IntEnum):
    """What the driver, or the person at the keyboard, wants of a run that works."""

    NONE = 0
    DRAIN_AFTER_CHECKPOINT = 1
    """End after the next checkpoint that is due: other workers go on from it."""
    DRAIN = 2
    """Save now and end: other workers go on from it."""
    STOP = 3
    """Save now and end."""


def _request_nothing() -> StopRequest:
    return StopRequest.NONE


def _continue_after_rung(_step: int) -> StopRequest:
    """Nobody stops a run at a rung."""
    return StopRequest.NONE


def _discard_event(event: Event) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class RunContext:
    """One rank's place among the ranks of a run; a process group exists when there are several."""

    rank: int
    world_size: int
    device: torch.device
    report: Callable[[Event], None] = _discard_event
    """Tells the person at the keyboard something; called on rank 0 alone."""
    read_stop_request: Callable[[], StopRequest] = _request_nothing
    """What is wanted of the run; asked on rank 0 alone, the loop makes all ranks agree."""
    rungs: tuple[int, ...] = ()
    """Steps after which a trial of a search is compared with others, before it goes on or ends."""
    await_rung: Callable[[int], StopRequest] = _continue_after_rung
    """Waits for the answer whether a trial goes on after a rung; asked on rank 0 alone."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Where this rank stands; kept up to date by whoever works, read by whoever watches."""

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which alone writes what is written once."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            import torch.distributed as dist  # noqa: PLC0415

            dist.barrier()

    def broadcast_object(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist  # noqa: PLC0415

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist  # noqa: PLC0415

        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks in double precision, in one exchange."""
        if self.world_size == 1:
            return [float(value) for value in values]
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]
