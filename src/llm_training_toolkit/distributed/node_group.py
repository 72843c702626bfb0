"""Ranks of one machine: one of them reads what all of them need, and broadcasts it to the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from llm_training_toolkit.distributed.context import RunContext

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class NodeGroup:
    """One rank among those of its machine."""

    ranks: tuple[int, ...]
    """Ranks of this machine, in ascending order; the first one reads."""
    is_reader: bool
    process_group: Any = None
    """torch's group of these ranks; None if they are all ranks there are, or if every machine has a single one."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite a contiguous tensor of any dtype with the reader's."""
        if len(self.ranks) == 1 or tensor.numel() == 0:
            return
        import torch  # noqa: PLC0415 - the driver imports this package without torch
        import torch.distributed as dist  # noqa: PLC0415

        # As bytes, because not every backend knows every dtype.
        dist.broadcast(tensor.view(-1).view(torch.uint8), src=self.ranks[0], group=self.process_group)

    def any_rank(self, flag: bool, device: torch.device) -> bool:
        """Return whether a rank of the machine passes True. `device`: of the group's backend. Collective."""
        if len(self.ranks) == 1:
            return flag
        import torch  # noqa: PLC0415
        import torch.distributed as dist  # noqa: PLC0415

        flags = torch.tensor([float(flag)], device=device)
        dist.all_reduce(flags, group=self.process_group)
        return bool(flags.item() > 0)

    def broadcast_object(self, value: T) -> T:
        """Return the reader's value on every rank of the machine."""
        if len(self.ranks) == 1:
            return value
        import torch.distributed as dist  # noqa: PLC0415

        box = [value]
        dist.broadcast_object_list(box, src=self.ranks[0], group=self.process_group)
        return box[0]


@contextmanager
def form_node_group(context: RunContext, machine: str) -> Iterator[NodeGroup]:
    """Group the ranks that name the same `machine`, for the length of the block. Collective."""
    machines = context.all_gather_object(machine)
    ranks = tuple(rank for rank, name in enumerate(machines) if name == machine)
    is_reader = ranks[0] == context.rank
    # All ranks make a group, or none: torch names later groups by the number of those there are. With other numbers on
    # a machine of one rank, the members of a tensor-parallel group on both would wait for each other under two names.
    if len(set(machines)) in {1, context.world_size}:
        yield NodeGroup(ranks, is_reader)
        return
    import torch.distributed as dist  # noqa: PLC0415

    # Synchronized among its members only: otherwise all ranks would wait for every machine's group in turn.
    process_group = dist.new_group(list(ranks), use_local_synchronization=True)
    try:
        yield NodeGroup(ranks, is_reader, process_group)
    finally:
        # NCCL's group would keep buffers on the GPU. Gloo's has none and stays: torch names a group by its ranks and
        # the number of groups there are, so that a later one in the same process would find the keys of this one.
        if context.device.type != "cpu":
            dist.destroy_process_group(process_group)
